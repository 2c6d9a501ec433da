package fetchproxy

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "fetchproxy/gen/fetchproxy/v1"
)

const (
	// The domain of the reasons of the proxy.
	domain = "fetchproxy"
	// The first wait before a call is repeated, and the longest wait.
	firstWait, longestWait = 100 * time.Millisecond, 5 * time.Second

	reasonExpired         = "LEASE_EXPIRED"
	reasonUnconfirmed     = "SETTLE_UNCONFIRMED"
	reasonUnauthenticated = "UNAUTHENTICATED"
	reasonTooLarge        = "REQUEST_TOO_LARGE"
)

// Error is the failure of a call, or of one settlement in a call.
type Error struct {
	// Reason is a reason of the proxy: see docs/reference/errors.md. It is the name of the status code if the
	// proxy gave no reason.
	Reason string
	// Code is the status code. It is Unknown in the result of one settlement, which has no code.
	Code codes.Code
	// Message is a text for people, which may change.
	Message string
	// RetryDelay is how long the proxy asks to wait before a repeat. 0: a wait does not help, or is not needed.
	RetryDelay time.Duration
	// Metadata says more about the reason.
	Metadata map[string]string

	repeatable bool
	cause      error
}

// Error returns the reason and the message.
func (e *Error) Error() string { return e.Reason + ": " + e.Message }

// Unwrap returns the error of the context, if the context of the call has ended.
func (e *Error) Unwrap() error { return e.cause }

// With these codes, the same call would be refused again.
var refusals = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.PermissionDenied,
	codes.Unauthenticated, codes.Unimplemented,
}

// callError reads the status of a call. An error without a reason comes from a transport on the way: only its
// code counts.
func callError(ctx context.Context, err error) *Error {
	if err == nil {
		return nil
	}
	if failed := (*Error)(nil); errors.As(err, &failed) {
		return failed
	}
	failed := status.Convert(err)
	e := &Error{
		Reason:     code.Code(failed.Code()).String(),
		Code:       failed.Code(),
		Message:    failed.Message(),
		repeatable: !slices.Contains(refusals, failed.Code()),
		cause:      ctx.Err(),
	}
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == domain {
				e.Reason, e.Metadata = detail.GetReason(), detail.GetMetadata()
				e.repeatable = e.repeatable && e.Reason != reasonTooLarge
			}
		case *errdetails.RetryInfo:
			e.RetryDelay = detail.GetRetryDelay().AsDuration()
		}
	}
	return e
}

// settleError reads the failure of one settlement.
func settleError(failed *pb.SettleError) *Error {
	if failed == nil {
		return nil
	}
	return &Error{
		Reason:     failed.GetReason(),
		Code:       codes.Unknown,
		Message:    failed.GetMessage(),
		RetryDelay: failed.GetRetryDelay().AsDuration(),
		Metadata:   failed.GetMetadata(),
		repeatable: failed.GetRetryDelay() != nil || failed.GetReason() == reasonUnconfirmed,
	}
}

// expired is the loss of a lease that is over by the clock of this process.
func expired(why string) *Error {
	return &Error{Reason: reasonExpired, Code: codes.FailedPrecondition, Message: why}
}

// cancelled is the loss of a lease that this process gives up.
func cancelled(why string) *Error {
	return &Error{Reason: "CANCELLED", Code: codes.Canceled, Message: why}
}

// wait returns how long to wait before a call is repeated. The wait is partly random, because workers that
// failed together must not come back together.
func (e *Error) wait(failed int) time.Duration {
	most := min(firstWait<<min(failed, 6), longestWait)
	return min(e.RetryDelay, longestWait) + most/2 + rand.N(most/2)
}

// sleep returns early if ctx ends.
func sleep(ctx context.Context, wait time.Duration) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
