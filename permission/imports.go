package permission

// imports tells which action each function that a guest can import needs.
var imports = map[[2]string]string{
	{KV, "get"}:                Read,
	{KV, "list"}:               Read,
	{KV, "set"}:                Write,
	{KV, "cas"}:                Write,
	{KV, "delete"}:             Delete,
	{HTTP, "request"}:          Request,
	{Messaging, "publish"}:     Publish,
	{Messaging, "request"}:     Publish,
	{Messaging, "subscribe"}:   Subscribe,
	{Messaging, "unsubscribe"}: Subscribe,
	{Provider, "call"}:         "",
}

// ForImport returns what a guest needs at least when it imports the function
// operation of the capability ("kv", "get"), without a resource; ask
// Set.MayEver with it. It reports false for a function that needs no
// permission, such as those of log and context, and for one that does not exist.
func ForImport(capability, operation string) (Need, bool) {
	action, ok := imports[[2]string{capability, operation}]
	if !ok {
		return Need{}, false
	}
	return Need{Capability: capability, Action: action}, true
}
