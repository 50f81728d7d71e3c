package fsm

import pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"

// putModule records a module. The bytes under a digest never change, so a
// module that is known stays as it was first uploaded.
func (t *tx) putModule(c *pb.PutModuleCommand) ([]string, *refusal) {
	digest := c.GetModule().GetDigest()
	if r := checkID("the module's digest", digest); r != nil {
		return nil, r
	}
	if _, known := first[*pb.Module](t.txn, tableModules, indexID, digest); known {
		return []string{digest}, nil
	}
	m := shallow(c.GetModule())
	m.CreatedAt = t.now
	m.CreatedIndex = t.index
	t.chain.put(hashModule, m)
	t.insert(tableModules, m)
	t.emit(&pb.Event{
		Kind:         pb.EventKind_EVENT_KIND_MODULE_UPLOADED,
		ModuleDigest: digest,
		Message:      m.GetName(),
	})
	return []string{digest}, nil
}
