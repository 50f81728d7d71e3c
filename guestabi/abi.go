package guestabi

import (
	"slices"
	"strings"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

// The names of interface version 1.
const (
	// Version is what follows the slash in the names of import modules.
	Version = "v1"
	// Prefix begins the names of our import modules: "wasmatrix:kv/v1".
	Prefix = "wasmatrix:"
	// WASI is the import module of WASI preview 1.
	WASI = "wasi_snapshot_preview1"
	// Result is the import module with which a guest reads answers that did not fit.
	Result = Prefix + "result/" + Version

	// Memory, Start, Initialize, Alloc and Drain are exports that hosts look for.
	Memory     = "memory"
	Start      = "_start"
	Initialize = "_initialize"
	Alloc      = "wasmatrix_alloc"
	Drain      = "wasmatrix_on_drain"

	// OnInvoke, OnHTTP and OnMessage are the handlers; one of them makes a module a reactor.
	OnInvoke  = "wasmatrix_on_invoke"
	OnHTTP    = "wasmatrix_on_http"
	OnMessage = "wasmatrix_on_message"
)

// Handlers returns the handlers in the order in which messages name them.
func Handlers() []string { return []string{OnInvoke, OnHTTP, OnMessage} }

// Capabilities returns, for each capability, the functions of its import module
// "wasmatrix:<capability>/v1". All have the same signature; those of Result do not
// belong to a capability.
func Capabilities() map[string][]string {
	return map[string][]string{
		"kv":        {"cas", "delete", "get", "list", "set"},
		"http":      {"request"},
		"messaging": {"publish", "request", "subscribe", "unsubscribe"},
		"provider":  {"call"},
		"log":       {"write"},
		"context":   {"get"},
	}
}

const wasmCore = "build a core module for WASI preview 1: GOOS=wasip1 GOARCH=wasm, wasm32-wasip1 for Rust, wasm32-wasi for clang"

// offered is what a guest may import: for each import module its functions, sorted.
var offered = offer()

func offer() map[string][]string {
	all := map[string][]string{
		Result: {"read"},
		WASI: {
			"args_get", "args_sizes_get", "clock_res_get", "clock_time_get", "environ_get", "environ_sizes_get",
			"fd_advise", "fd_allocate", "fd_close", "fd_datasync", "fd_fdstat_get", "fd_fdstat_set_flags",
			"fd_fdstat_set_rights", "fd_filestat_get", "fd_filestat_set_size", "fd_filestat_set_times", "fd_pread",
			"fd_prestat_dir_name", "fd_prestat_get", "fd_pwrite", "fd_read", "fd_readdir", "fd_renumber", "fd_seek",
			"fd_sync", "fd_tell", "fd_write", "path_create_directory", "path_filestat_get", "path_filestat_set_times",
			"path_link", "path_open", "path_readlink", "path_remove_directory", "path_rename", "path_symlink",
			"path_unlink_file", "poll_oneoff", "proc_exit", "proc_raise", "random_get", "sched_yield", "sock_accept",
			"sock_recv", "sock_send", "sock_shutdown",
		},
	}
	for capability, functions := range Capabilities() {
		all[Prefix+capability+"/"+Version] = functions
	}
	return all
}

// checkImport refuses a function that no host of this version offers.
func checkImport(module, name string) error {
	functions, known := offered[module]
	if known && slices.Contains(functions, name) {
		return nil
	}
	refused := apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST,
		"module imports %s %s, which no host offers", module, name).
		With("import", module+" "+name)
	base, version, _ := strings.Cut(module, "/")
	switch {
	case known:
		return refused.With("offered", strings.Join(functions, ", ")).
			Next("import only the functions that %s offers", module)
	case strings.HasPrefix(module, Prefix) && offered[base+"/"+Version] != nil:
		return refused.With("found_version", version).With("offered_version", Version).
			Next("build the module for interface version 1: %s/v1", base)
	case module == "wasi_unstable" || strings.HasPrefix(module, "wasi"):
		return refused.With("offered", WASI).Next(wasmCore)
	case module == "env":
		return refused.Next("link all symbols into the module; a function of \"env\" is one the linker did not find")
	case module == "gojs" || module == "go":
		return refused.Next("build with GOOS=wasip1 GOARCH=wasm instead of GOOS=js")
	default:
		return refused.Next("import only %s and the wasmatrix: modules of interface version 1", WASI)
	}
}

// kindOf tells the kind of module by its exports and refuses one that a host
// could not call. The executor decides by the same rules.
func kindOf(imports, functions []string, hasMemory bool) (pb.ModuleKind, error) {
	has := func(name string) bool {
		_, found := slices.BinarySearch(functions, name)
		return found
	}
	handlers := Handlers()
	reactor := slices.IndexFunc(handlers, has)
	switch {
	case reactor >= 0 && has(Start):
		return 0, notAGuest("module exports both %s and %s: it is neither a reactor nor a command", Start, handlers[reactor]).
			Next("build a reactor without %s (for Go: -buildmode=c-shared), or a command without handlers", Start)
	case reactor >= 0 && !hasMemory:
		return 0, notAGuest("reactor does not export its memory as %q", Memory).
			Next("export the memory")
	case reactor >= 0 && !has(Alloc):
		return 0, notAGuest("reactor exports %s and no %s", handlers[reactor], Alloc).
			Next("export %s(len i32) -> i32, or use one of the guest SDKs, which do", Alloc)
	case reactor >= 0:
		return pb.ModuleKind_MODULE_KIND_REACTOR, nil
	case has(Start) && len(imports) > 0 && !hasMemory:
		return 0, notAGuest("command imports functions and does not export its memory as %q", Memory).
			Next("export the memory: what it imports reads and writes there")
	case has(Start):
		return pb.ModuleKind_MODULE_KIND_COMMAND, nil
	default:
		return 0, notAGuest("module exports neither a handler nor %s: nothing in it can be run", Start).
			With("handlers", strings.Join(handlers, ", ")).
			Next("export a handler, as docs/guests.md tells, or build a command with a main function")
	}
}

func notAGuest(format string, args ...any) *apierror.Error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, format, args...)
}

// Empty is the refusal of a module of 0 bytes.
func Empty() *apierror.Error {
	return notAGuest("module is empty: 0 bytes").Next("check that the build wrote the file")
}
