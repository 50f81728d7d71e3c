// Package module reads guest modules before anything else does: it checks a
// WebAssembly binary against limits in linear time and bounded memory, tells
// what it imports and exports, and rewrites it so that it can always be
// stopped (Meter). What comes out of Meter is encoded anew from what was
// understood, byte for byte, so that the compiler behind it cannot read the
// module in another way than this package did.
//
// It accepts WebAssembly 1.0 with sign extension, saturating conversions,
// multiple values, bulk memory, reference types and SIMD; not threads, tail
// calls, exceptions, garbage collection or several memories. Types are left to
// the compiler's own validation.
//
// It imports nothing of wasmatrix and no WebAssembly engine.
package module
