//go:build !wasip1

package wasmatrix

import "unsafe"

// Outside a guest there is no host: every call fails, so that a guest's own
// unit tests can run on any machine with what they put in place themselves.
func noHost(_ unsafe.Pointer, _ uint32, _ unsafe.Pointer, _ uint32) uint64 {
	return uint64(Unavailable) << 32
}

var (
	kvGet, kvSet, kvDelete, kvList, kvCas                hostCall = noHost, noHost, noHost, noHost, noHost
	httpRequest, providerCall, logWrite, contextGet      hostCall = noHost, noHost, noHost, noHost
	msgPublish, msgRequest, msgSubscribe, msgUnsubscribe hostCall = noHost, noHost, noHost, noHost
)

// resultRead fetches an answer that did not fit; without a host there is none.
var resultRead = func(unsafe.Pointer, uint32) uint32 { return 0 }
