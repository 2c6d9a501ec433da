package fetchproxy

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// One settlement that the proxy refuses would fail its whole call. So these values are limited here.
const (
	// MaxSettlements is the largest number of settlements of a call.
	MaxSettlements = 1000
	// MaxReason is the longest reason of a Term, in bytes.
	MaxReason = 1024
	// MaxDelay is the longest delay of a Nak.
	MaxDelay = 24 * time.Hour
	// MinLease is the shortest lease that can be asked for.
	MinLease = time.Second
)

// Settlement is an action for one lease: see [Client.Settle].
type Settlement = pb.Settlement

// Outcome is the effect of a settlement that has succeeded.
type Outcome = pb.Outcome

// SettleAck settles a message as done.
func SettleAck(token string) *Settlement {
	return &Settlement{Token: token, Action: &pb.Settlement_Ack{Ack: &pb.AckAction{}}}
}

// SettleNak settles a message as not done: it comes back after the delay, which is lowered to [MaxDelay].
func SettleNak(token string, delay time.Duration) *Settlement {
	nak := &pb.NakAction{Delay: durationpb.New(max(0, min(delay, MaxDelay)))}
	return &Settlement{Token: token, Action: &pb.Settlement_Nak{Nak: nak}}
}

// SettleTerm settles a message as impossible: it does not come back. The reason is cut to [MaxReason].
func SettleTerm(token, reason string) *Settlement {
	reason = strings.ToValidUTF8(reason[:min(len(reason), MaxReason)], "")
	return &Settlement{Token: token, Action: &pb.Settlement_Term{Term: &pb.TermAction{Reason: reason}}}
}

// SettleExtend moves the end of a lease. With 0, the lease lasts for as long as it was granted. Another length
// below [MinLease] is raised to it.
func SettleExtend(token string, lease time.Duration) *Settlement {
	extend := &pb.ExtendAction{}
	if lease != 0 {
		extend.Lease = durationpb.New(max(lease, MinLease))
	}
	return &Settlement{Token: token, Action: &pb.Settlement_Extend{Extend: extend}}
}

// SettleResult is the result of one settlement.
type SettleResult struct {
	// Outcome is set if the settlement has succeeded.
	Outcome Outcome
	// Lease is how long the lease lasts, after an Extend.
	Lease time.Duration
	// Err is set if the settlement has failed.
	Err *Error
}

func newSettleResult(result *pb.SettleResult) SettleResult {
	return SettleResult{result.GetOutcome(), result.GetLease().AsDuration(), settleError(result.GetError())}
}

// resultAt returns a result of a call. A result that the answer lacks may have been applied.
func resultAt(results []*pb.SettleResult, at int) SettleResult {
	if at >= len(results) {
		return SettleResult{Err: settleError(&pb.SettleError{
			Reason: reasonUnconfirmed, Message: "the answer has no result of it",
		})}
	}
	return newSettleResult(results[at])
}
