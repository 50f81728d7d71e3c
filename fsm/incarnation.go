package fsm

import pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"

// initCluster gives the cluster its identity. It has one for good then.
func (t *tx) initCluster(c *pb.InitClusterCommand) ([]string, *refusal) {
	if r := checkID("the cluster's id", c.GetClusterId()); r != nil {
		return nil, r
	}
	if t.sum.clusterID != "" {
		return nil, refuse(pb.ErrorCode_ERROR_CODE_CONFLICT, "the cluster has the identity %s already", t.sum.clusterID).
			with("cluster_id", t.sum.clusterID)
	}
	t.sum.clusterID = c.GetClusterId()
	t.chain.put(hashCluster, c)
	return []string{c.GetClusterId()}, nil
}

// ClusterID tells this cluster from others of the same name; it is empty until
// the first leader has given it.
func (v View) ClusterID() string { return v.sum.clusterID }

// WithClusterID returns the same state as one of another cluster, to write a
// snapshot that this other cluster can take over.
func (v View) WithClusterID(id string) View {
	v.sum.clusterID = id
	return v
}
