package permission

// Need is what one capability call asks for.
type Need struct {
	// Capability is "kv", "http", "messaging" or "provider".
	Capability string
	// Action is what the grammar names: "read", "write", "delete", "request",
	// "publish", "subscribe", or an external provider's operation.
	Action string
	// Resource is the key, host or topic; for "provider" the provider's id.
	Resource string
}
