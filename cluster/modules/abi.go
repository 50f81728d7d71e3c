package modules

import (
	"slices"
	"strings"

	"github.com/wasmatrix/wasmatrix/apierror"
	pb "github.com/wasmatrix/wasmatrix/proto/wasmatrix/v1"
)

const (
	wasiModule = "wasi_snapshot_preview1"
	wasmCore   = "build a core module for WASI preview 1: GOOS=wasip1 GOARCH=wasm, wasm32-wasip1 for Rust, wasm32-wasi for clang"

	exportStart  = "_start"
	exportMemory = "memory"
	exportAlloc  = "wasmatrix_alloc"
)

// handlers are the exports that make a module a reactor.
var handlers = []string{"wasmatrix_on_invoke", "wasmatrix_on_http", "wasmatrix_on_message"}

// offered is what a guest may import, interface version 1: for each import
// module its functions. It equals the table of docs on the guest interface.
var offered = map[string][]string{
	"wasmatrix:kv/v1":        {"cas", "delete", "get", "list", "set"},
	"wasmatrix:http/v1":      {"request"},
	"wasmatrix:messaging/v1": {"publish", "request", "subscribe", "unsubscribe"},
	"wasmatrix:provider/v1":  {"call"},
	"wasmatrix:log/v1":       {"write"},
	"wasmatrix:context/v1":   {"get"},
	"wasmatrix:result/v1":    {"read"},
	wasiModule: {
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
	case strings.HasPrefix(module, "wasmatrix:") && offered[base+"/v1"] != nil:
		return refused.With("found_version", version).With("offered_version", "v1").
			Next("build the module for interface version 1: %s/v1", base)
	case module == "wasi_unstable" || strings.HasPrefix(module, "wasi"):
		return refused.With("offered", wasiModule).Next(wasmCore)
	case module == "env":
		return refused.Next("link all symbols into the module; a function of \"env\" is one the linker did not find")
	case module == "gojs" || module == "go":
		return refused.Next("build with GOOS=wasip1 GOARCH=wasm instead of GOOS=js")
	default:
		return refused.Next("import only %s and the wasmatrix: modules of interface version 1", wasiModule)
	}
}

// kindOf tells the kind of module by its exports and refuses one that a host
// could not call. The executor decides by the same rules.
func kindOf(imports, functions []string, hasMemory bool) (pb.ModuleKind, error) {
	has := func(name string) bool {
		_, found := slices.BinarySearch(functions, name)
		return found
	}
	reactor := slices.IndexFunc(handlers, has)
	switch {
	case reactor >= 0 && has(exportStart):
		return 0, notAGuest("module exports both %s and %s: it is neither a reactor nor a command", exportStart, handlers[reactor]).
			Next("build a reactor without %s (for Go: -buildmode=c-shared), or a command without handlers", exportStart)
	case reactor >= 0 && !hasMemory:
		return 0, notAGuest("reactor does not export its memory as %q", exportMemory).
			Next("export the memory")
	case reactor >= 0 && !has(exportAlloc):
		return 0, notAGuest("reactor exports %s and no %s", handlers[reactor], exportAlloc).
			Next("export %s(len i32) -> i32, or use one of the guest SDKs, which do", exportAlloc)
	case reactor >= 0:
		return pb.ModuleKind_MODULE_KIND_REACTOR, nil
	case has(exportStart) && len(imports) > 0 && !hasMemory:
		return 0, notAGuest("command imports functions and does not export its memory as %q", exportMemory).
			Next("export the memory: what it imports reads and writes there")
	case has(exportStart):
		return pb.ModuleKind_MODULE_KIND_COMMAND, nil
	default:
		return 0, notAGuest("module exports neither a handler nor %s: nothing in it can be run", exportStart).
			With("handlers", strings.Join(handlers, ", ")).
			Next("export a handler, as docs/guests.md tells, or build a command with a main function")
	}
}

func notAGuest(format string, args ...any) *apierror.Error {
	return apierror.New(pb.ErrorCode_ERROR_CODE_INVALID_REQUEST, format, args...)
}

func emptyModule() *apierror.Error {
	return notAGuest("module is empty: 0 bytes").Next("check that the build wrote the file")
}
