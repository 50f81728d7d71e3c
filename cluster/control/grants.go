package control

import (
	"slices"
	"strings"

	"github.com/wasmatrix/wasmatrix/apierror"
	"github.com/wasmatrix/wasmatrix/fsm"
	"github.com/wasmatrix/wasmatrix/permission"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// capabilityOf tells which capability a type of provider serves.
var capabilityOf = map[string]string{
	"kv":        permission.KV,
	"http":      permission.HTTP,
	"messaging": permission.Messaging,
	"external":  permission.Provider,
}

// allowExample shows how to grant what an import needs, by capability and action.
var allowExample = map[permission.Need]string{
	{Capability: permission.Messaging, Action: permission.Publish}:   "msg:publish:<topic>",
	{Capability: permission.Messaging, Action: permission.Subscribe}: "msg:subscribe:<topic>",
	{Capability: permission.Provider}:                                "provider:<id>:<operation>",
}

// checkGrant checks that permissions are well-formed and belong to the type of
// the provider. A provider that does not exist is left to the state to refuse,
// which also answers repeated requests; the set is nil then.
func checkGrant(view fsm.View, grant *pb.CapabilityGrant) (*permission.Set, error) {
	set, err := permission.ParseSet(grant.GetPermissions())
	if err != nil {
		return nil, invalid("%s", strings.ReplaceAll(err.Error(), "\n", "; ")).
			With("provider", grant.GetProvider()).
			Next("see docs/permissions.md for the grammar")
	}
	p, ok := view.Provider(grant.GetProvider())
	if !ok {
		return nil, nil //nolint:nilnil // the comment above says what it means
	}
	kind := p.GetSpec().GetType()
	for _, text := range set.Strings() {
		if err := checkFits(text, kind, p.GetId()); err != nil {
			return nil, err
		}
	}
	if grant.GetBucket() != "" && kind != "kv" {
		return nil, invalid("provider %s is of type %s, and only providers of type kv have buckets", p.GetId(), kind).
			With("provider", p.GetId()).With("bucket", grant.GetBucket()).
			Next("leave the bucket out")
	}
	return &set, nil
}

// checkFits refuses a permission that the provider could never be asked for.
func checkFits(text, kind, providerID string) error {
	p, err := permission.Parse(text)
	if err != nil {
		return invalid("%s", err)
	}
	if p.Capability() != capabilityOf[kind] {
		return invalid("permission %s is not one of provider %s, which is of type %s", text, providerID, kind).
			With("permission", text).With("provider", providerID).With("type", kind).
			Next("wasmatrix provider list")
	}
	if p.Capability() != permission.Provider {
		return nil
	}
	parts := strings.SplitN(text, ":", 3)
	if len(parts) == 3 && parts[1] != providerID {
		return invalid("permission %s names another provider than %s, with which it is granted", text, providerID).
			With("permission", text).With("provider", providerID).
			Next("grant provider:%s:%s", providerID, parts[2])
	}
	return nil
}

// checkImports refuses a module that imports what none of the grants could ever
// allow, so that it is told before it starts and not by its first call.
func checkImports(m *pb.Module, granted []permission.Set) error {
	var missing, allows []string
	var refused *apierror.Error
	for _, imported := range m.GetImports() {
		need, ok := needOf(imported)
		if !ok || mayEver(granted, need) {
			continue
		}
		allow := allowFor(need)
		if refused == nil {
			refused = apierror.New(pb.ErrorCode_ERROR_CODE_PERMISSION_DENIED,
				"%s imports %s and no %s permission was granted", moduleName(m), imported, strings.TrimSuffix(need.String(), ":*:*")).
				With("import", imported)
		}
		missing = append(missing, imported+" ("+allow+")")
		if flag := "--allow " + allow; !slices.Contains(allows, flag) {
			allows = append(allows, flag)
		}
	}
	if refused == nil {
		return nil
	}
	return refused.With("module", m.GetDigest()).With("missing", strings.Join(missing, ", ")).
		Next("add %s", strings.Join(allows, " "))
}

// needOf returns what a guest needs at least when it imports a function, given
// as "wasmatrix:kv/v1 get". It reports false for one that needs no permission.
func needOf(imported string) (permission.Need, bool) {
	module, function, _ := strings.Cut(imported, " ")
	capability, isOurs := strings.CutPrefix(module, "wasmatrix:")
	if !isOurs {
		return permission.Need{}, false
	}
	capability, _, _ = strings.Cut(capability, "/")
	return permission.ForImport(capability, function)
}

func mayEver(granted []permission.Set, need permission.Need) bool {
	for _, set := range granted {
		if set.MayEver(need) {
			return true
		}
	}
	return false
}

func allowFor(need permission.Need) string {
	if example, ok := allowExample[need]; ok {
		return example
	}
	return need.String()
}

// moduleName is the name people know a module by.
func moduleName(m *pb.Module) string {
	if m.GetName() != "" {
		return m.GetName()
	}
	return m.GetDigest()
}
