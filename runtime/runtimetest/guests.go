package runtimetest

// Guests for tests of executors and of what stands around them. Each is a whole
// module of guest interface version 1.

const (
	// scratch is where the guests below put what they are given.
	scratch = 4096
	// outAt and outCap are the room that Caller offers for answers.
	outAt, outCap = 1024, 256
)

var (
	handlerParams  = []byte{I32, I32}
	handlerResults = []byte{I64}
	callParams     = []byte{I32, I32, I32, I32}
)

// Packed is code that pushes what a handler returns: pointer and length, both
// given as code that pushes an i32.
func Packed(pointer, length []byte) []byte {
	return Cat(pointer, I64ExtendU, I64Const(32), I64Shl, length, I64ExtendU, I64Or)
}

// reactor adds memory and wasmatrix_alloc, which hands out the same room each
// time and grows the memory when it has to.
func reactor(m *Module) {
	m.Memory(2)
	m.Func("wasmatrix_alloc", []byte{I32}, []byte{I32}, nil,
		// if scratch+len > size*64Ki then grow by len/64Ki+1
		I32Const(scratch), LocalGet(0), I32Add,
		MemorySize, I32Const(16), I32Shl, I32GtU,
		If(LocalGet(0), I32Const(16), I32ShrU, I32Const(1), I32Add, MemoryGrow, Drop),
		I32Const(scratch))
}

// Handler is a reactor whose invoke handler runs code; parameters 0 and 1 are
// pointer and length of the input, then come locals; code leaves the packed
// result.
func Handler(locals []byte, code ...[]byte) []byte {
	var m Module
	reactor(&m)
	m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, locals, code...)
	return m.Bytes()
}

// Echo is a reactor whose invoke, HTTP and message handlers answer with their input.
func Echo() []byte {
	var m Module
	reactor(&m)
	for _, name := range []string{"wasmatrix_on_invoke", "wasmatrix_on_http", "wasmatrix_on_message"} {
		m.Func(name, handlerParams, handlerResults, nil, Packed(LocalGet(0), LocalGet(1)))
	}
	return m.Bytes()
}

// Counter is a reactor that answers with one byte: how often its memory has
// been called.
func Counter() []byte {
	return Handler(nil,
		I32Const(0), I32Const(0), I32Load, I32Const(1), I32Add, I32Store,
		Packed(I32Const(0), I32Const(1)))
}

// Spinner is a reactor that never returns from a call, except from an empty one.
func Spinner() []byte {
	return Handler(nil, LocalGet(1), If(Loop(Br(0))), I64Const(0))
}

// GrowingSpinner is a Spinner that takes a page more before it spins.
func GrowingSpinner() []byte {
	return Handler(nil, LocalGet(1), If(I32Const(1), MemoryGrow, Drop, Loop(Br(0))), I64Const(0))
}

// Either is a reactor that traps when its input is empty and spins otherwise.
func Either() []byte {
	return Handler(nil, LocalGet(1), If(Loop(Br(0))), Unreachable)
}

// Trapper is a reactor that echoes unless its input is empty; then it traps in a
// function named crash_here.
func Trapper() []byte {
	var m Module
	reactor(&m)
	crash := m.Func("crash_here", nil, nil, nil, Unreachable)
	m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil,
		LocalGet(1), I32Eqz, If(Call(crash)), Packed(LocalGet(0), LocalGet(1)))
	return m.Bytes()
}

// Grower is a reactor that takes a page more until it is refused, and then traps.
func Grower() []byte {
	return Handler(nil,
		Loop(I32Const(1), MemoryGrow, I32Const(-1), []byte{0x47}, BrIf(0)),
		Unreachable)
}

// PatientGrower is a reactor that takes a page more until it is refused, and
// answers with four bytes: the number of pages it has.
func PatientGrower() []byte {
	return Handler(nil,
		Loop(I32Const(1), MemoryGrow, I32Const(-1), []byte{0x47}, BrIf(0)),
		I32Const(0), MemorySize, I32Store, Packed(I32Const(0), I32Const(4)))
}

// Caller is a reactor that hands its input to one imported function of a
// capability, such as "wasmatrix:kv/v1" and "get", and answers with four bytes of
// status followed by what came back, fetched through wasmatrix:result/v1 when it
// is longer than 256 bytes.
func Caller(module, function string) []byte {
	var m Module
	call := m.Import(module, function, callParams, []byte{I64})
	read := m.Import("wasmatrix:result/v1", "read", []byte{I32, I32}, []byte{I32})
	reactor(&m)
	const status, length = 2, 3
	m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, []byte{I64, I32},
		LocalGet(0), LocalGet(1), I32Const(outAt+4), I32Const(outCap), Call(call), LocalTee(status),
		I32Wrap, LocalSet(length),
		I32Const(outAt), LocalGet(status), I64Const(32), I64ShrU, I32Wrap, I32Store,
		LocalGet(length), I32Const(outCap), I32GtU,
		// The answer is at most as long as the memory behind outAt.
		If(I32Const(outAt+4), LocalGet(length), Call(read), LocalSet(length)),
		Packed(I32Const(outAt), Cat(LocalGet(length), I32Const(4), I32Add)))
	return m.Bytes()
}

// RawCaller is a reactor that calls an imported function of a capability with
// these four arguments and answers with the eight bytes it returned.
func RawCaller(module, function string, args [4]int32) []byte {
	var m Module
	call := m.Import(module, function, callParams, []byte{I64})
	reactor(&m)
	m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil,
		I32Const(0),
		I32Const(args[0]), I32Const(args[1]), I32Const(args[2]), I32Const(args[3]), Call(call),
		[]byte{0x37, 3, 0}, // i64.store
		Packed(I32Const(0), I32Const(8)))
	return m.Bytes()
}

// Drainer is a reactor that echoes, and calls "wasmatrix:log/v1" write when it is
// drained.
func Drainer() []byte {
	var m Module
	write := m.Import("wasmatrix:log/v1", "write", callParams, []byte{I64})
	reactor(&m)
	m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil, Packed(LocalGet(0), LocalGet(1)))
	m.Func("wasmatrix_on_drain", nil, []byte{I32}, nil,
		I32Const(0), I32Const(0), I32Const(outAt), I32Const(outCap), Call(write), Drop, I32Const(0))
	return m.Bytes()
}

// StubbornDrainer is a reactor that echoes and never returns from its drain handler.
func StubbornDrainer() []byte {
	var m Module
	reactor(&m)
	m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil, Packed(LocalGet(0), LocalGet(1)))
	m.Func("wasmatrix_on_drain", nil, []byte{I32}, nil, Loop(Br(0)), I32Const(0))
	return m.Bytes()
}

// Initializer is a reactor whose _initialize runs code, and that answers with the
// first four bytes of its memory.
func Initializer(code ...[]byte) []byte {
	var m Module
	reactor(&m)
	m.Func("_initialize", nil, nil, nil, code...)
	m.Func("wasmatrix_on_invoke", handlerParams, handlerResults, nil, Packed(I32Const(0), I32Const(4)))
	return m.Bytes()
}

// Command is a command whose _start runs code, with fd_write, fd_read, args_get,
// environ_get, poll_oneoff and proc_exit of WASI as functions 0 to 5 and two
// pages of memory.
func Command(locals []byte, code ...[]byte) []byte {
	var m Module
	wasi := func(name string, params ...byte) {
		m.Import("wasi_snapshot_preview1", name, params, []byte{I32})
	}
	wasi("fd_write", I32, I32, I32, I32)
	wasi("fd_read", I32, I32, I32, I32)
	wasi("args_get", I32, I32)
	wasi("environ_get", I32, I32)
	wasi("poll_oneoff", I32, I32, I32, I32)
	m.Import("wasi_snapshot_preview1", "proc_exit", []byte{I32}, nil)
	m.Memory(2)
	m.Func("_start", nil, nil, locals, code...)
	return m.Bytes()
}

// Indices of the functions that Command imports.
const (
	fdWrite, fdRead, argsGet, environGet, pollOneoff, procExit = 0, 1, 2, 3, 4, 5
)

// Exit is a command that ends with an exit code.
func Exit(code int32) []byte { return Command(nil, I32Const(code), Call(procExit)) }

// store32 is code that stores a constant.
func store32(at, value int32) []byte { return Cat(I32Const(at), I32Const(value), I32Store) }

// CatCommand is a command that copies its input to its output and "done" to its errors.
func CatCommand() []byte {
	const iovec, count, buffer = 0, 8, 1024
	return Command(nil,
		Block(Loop(
			store32(iovec, buffer), store32(iovec+4, 512),
			I32Const(0), I32Const(iovec), I32Const(1), I32Const(count), Call(fdRead), Drop,
			I32Const(count), I32Load, I32Eqz, BrIf(1),
			I32Const(iovec+4), I32Const(count), I32Load, I32Store,
			I32Const(1), I32Const(iovec), I32Const(1), I32Const(count), Call(fdWrite), Drop,
			Br(0))),
		store32(buffer, 0x656e6f64), store32(iovec, buffer), store32(iovec+4, 4),
		I32Const(2), I32Const(iovec), I32Const(1), I32Const(count), Call(fdWrite), Drop)
}

// ArgsCommand is a command that writes its arguments, its own name left out, and
// its environment, each entry followed by a zero byte.
func ArgsCommand(argsBytes, environBytes, name int32) []byte {
	const iovec, pointers, buffer = 0, 1024, 8192
	write := func(from, size int32) []byte {
		return Cat(store32(iovec, from), store32(iovec+4, size),
			I32Const(1), I32Const(iovec), I32Const(1), I32Const(8), Call(fdWrite), Drop)
	}
	return Command(nil,
		I32Const(pointers), I32Const(buffer), Call(argsGet), Drop,
		write(buffer+name, argsBytes-name),
		I32Const(pointers), I32Const(buffer), Call(environGet), Drop,
		write(buffer, environBytes))
}

// Sleeper is a command that sleeps for so many nanoseconds.
func Sleeper(nanoseconds int64) []byte {
	return Command(nil,
		// One relative subscription to the monotonic clock at 64.
		store32(64+16, 1), I32Const(64+24), I64Const(nanoseconds), []byte{0x37, 3, 0},
		I32Const(64), I32Const(128), I32Const(1), I32Const(256), Call(pollOneoff), Drop)
}

// SpinCommand is a command that never ends.
func SpinCommand() []byte { return Command(nil, Loop(Br(0))) }
