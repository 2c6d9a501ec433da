package fetchproxytest

import (
	"context"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// The waits that the proxy asks for are shorter in a test.
const retryDelay = 10 * time.Millisecond

// codeOf has the code of each reason, by docs/reference/errors.md.
var codeOf = map[string]codes.Code{
	"INVALID_FIELD":       codes.InvalidArgument,
	"TOKEN_INVALID":       codes.InvalidArgument,
	"KEY_UNKNOWN":         codes.Unavailable,
	"STREAM_NOT_FOUND":    codes.NotFound,
	"CONSUMER_NOT_FOUND":  codes.NotFound,
	"CONSUMER_UNSUITABLE": codes.FailedPrecondition,
	"CONSUMER_SUSPECTED":  codes.Unavailable,
	"CONSUMER_BUSY":       codes.ResourceExhausted,
	"LEASE_EXPIRED":       codes.FailedPrecondition,
	"LEASE_SETTLED":       codes.FailedPrecondition,
	"LEASE_BUSY":          codes.Aborted,
	"UNAUTHENTICATED":     codes.Unauthenticated,
	"AUTH_UNAVAILABLE":    codes.Unavailable,
	"NOT_ALLOWED":         codes.PermissionDenied,
	"NATS_PERMISSION":     codes.PermissionDenied,
	"RATE_LIMIT":          codes.ResourceExhausted,
	"LEASE_LIMIT":         codes.ResourceExhausted,
	"WAITER_LIMIT":        codes.ResourceExhausted,
	"CALL_LIMIT":          codes.ResourceExhausted,
	"BYTE_LIMIT":          codes.ResourceExhausted,
	"REQUEST_TIMEOUT":     codes.Unavailable,
	"CONNECTION_LIMIT":    codes.ResourceExhausted,
	"NATS_UNAVAILABLE":    codes.Unavailable,
	"DRAINING":            codes.Unavailable,
	"OWNER_UNREACHABLE":   codes.Unavailable,
	"SETTLE_UNCONFIRMED":  codes.DeadlineExceeded,
	"STREAM_SILENT":       codes.DeadlineExceeded,
	"JETSTREAM_DENIED":    codes.FailedPrecondition,
	"MALFORMED":           codes.InvalidArgument,
	"REQUEST_TOO_LARGE":   codes.ResourceExhausted,
	"UNSUPPORTED":         codes.Unimplemented,
}

var errBroken = status.Error(codes.Unavailable, "the test has broken the connection")

// service speaks the contract. It decides nothing: see queue.
type service struct {
	pb.UnimplementedFetchServiceServer

	proxy *Proxy
}

// attempt is a named Fetch.
type attempt struct {
	leases []*lease
	isOver bool
}

func (s *service) lock() (unlock func()) {
	s.proxy.mutex.Lock()
	return s.proxy.mutex.Unlock
}

// failure takes the next failure of a method. The mutex is held.
func (s *service) failure(method string) (reason string) {
	if reasons := s.proxy.failing[method]; len(reasons) > 0 {
		reason, s.proxy.failing[method] = reasons[0], reasons[1:]
	}
	return reason
}

// isLost returns whether the answer of this call is to be lost. The mutex is held.
func (s *service) isLost(method string) bool {
	isLost := s.proxy.losing[method] > 0
	if isLost {
		s.proxy.losing[method]--
	}
	return isLost
}

func statusOf(reason, message string) error {
	code := codeOf[reason]
	failed := status.New(code, message)
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: reason, Domain: "fetchproxy"}}
	if isRepeatable(reason) {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retryDelay)})
	}
	for _, detail := range details {
		if with, err := failed.WithDetails(detail); err == nil {
			failed = with
		}
	}
	return failed.Err()
}

// isRepeatable returns whether the proxy asks to wait before a repeat.
func isRepeatable(reason string) bool {
	code := codeOf[reason]
	return code == codes.Unavailable || code == codes.Aborted ||
		(code == codes.ResourceExhausted && reason != "REQUEST_TOO_LARGE")
}

func (s *service) Fetch(ctx context.Context, request *pb.FetchRequest) (*pb.FetchResponse, error) {
	p, answer := s.proxy, &pb.FetchResponse{}
	p.mutex.Lock()
	broken := p.broken
	if reason := s.failure("Fetch"); reason != "" {
		p.mutex.Unlock()
		return nil, statusOf(reason, "the test lets this Fetch fail")
	}
	for _, settlement := range request.GetSettlements() {
		result := p.queue.settle(time.Now(), p.queue.leases[settlement.GetToken()], settlement)
		answer.Results = append(answer.Results, result)
		if result.GetError() != nil {
			answer.Failed++
		}
	}
	p.change()
	p.mutex.Unlock()
	if answer.Failed > 0 {
		answer.EmptyReason = pb.EmptyReason_EMPTY_REASON_SETTLE
		return answer, nil
	}
	wait := 30 * time.Second
	if request.MaxWait != nil {
		wait = request.MaxWait.AsDuration()
	}
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	isBroken := false
	p.waitUntil(waiting, func() bool {
		select {
		case <-broken:
			isBroken = true
		default:
		}
		return isBroken || len(p.queue.ready) > 0 || p.attempts[request.GetAttemptId()] != nil
	})
	defer s.lock()()
	if isBroken {
		return nil, errBroken
	}
	if ctx.Err() != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	s.fill(answer, request)
	if s.isLost("Fetch") {
		return nil, errBroken
	}
	return answer, nil
}

// fill leases messages to a Fetch, or those of its attempt again. The mutex is held.
func (s *service) fill(answer *pb.FetchResponse, request *pb.FetchRequest) {
	p, now := s.proxy, time.Now()
	t := terms{codec: request.GetCodec(), maxBytes: request.GetMaxBytes(), length: p.queue.ackWait}
	if request.Lease != nil {
		t.length = request.Lease.AsDuration()
	}
	if known := p.attempts[request.GetAttemptId()]; known != nil {
		for _, l := range known.leases {
			known.isOver = known.isOver || l.isOver
			if !known.isOver {
				l.ends = now.Add(t.length)
				answer.Messages = append(answer.Messages, p.queue.again(now, l, t.codec))
			}
		}
		if known.isOver || len(known.leases) == 0 {
			answer.Messages, answer.EmptyReason = nil, pb.EmptyReason_EMPTY_REASON_ATTEMPT_OVER
		}
		return
	}
	named := &attempt{}
	for len(p.queue.ready) > 0 && len(answer.Messages)+len(answer.Rejected) < max(int(request.GetN()), 1) {
		l, delivery, rejected := p.queue.deliver(now, t)
		if delivery != nil {
			answer.Messages = append(answer.Messages, delivery)
		} else {
			answer.Rejected = append(answer.Rejected, rejected)
		}
		if l != nil {
			named.leases = append(named.leases, l)
		}
	}
	if name := request.GetAttemptId(); name != "" && len(named.leases) > 0 {
		p.attempts[name] = named
	}
	switch {
	case len(answer.Messages) > 0:
	case len(answer.Rejected) > 0:
		answer.EmptyReason = pb.EmptyReason_EMPTY_REASON_REJECTED
	default:
		answer.EmptyReason = pb.EmptyReason_EMPTY_REASON_NO_MESSAGES
	}
	p.change()
}

func (s *service) GiveBack(_ context.Context, request *pb.GiveBackRequest) (*pb.GiveBackResponse, error) {
	defer s.lock()()
	p, answer := s.proxy, &pb.GiveBackResponse{}
	if reason := s.failure("GiveBack"); reason != "" {
		return nil, statusOf(reason, "the test lets this GiveBack fail")
	}
	known := p.attempts[request.GetAttemptId()]
	if known == nil {
		known = &attempt{}
		p.attempts[request.GetAttemptId()] = known
	}
	known.isOver = true
	for _, l := range known.leases {
		if !l.isOver {
			p.queue.end(l)
			answer.Messages++
		}
	}
	p.change()
	return answer, nil
}

func (s *service) Settle(_ context.Context, request *pb.SettleRequest) (*pb.SettleResponse, error) {
	defer s.lock()()
	p, answer := s.proxy, &pb.SettleResponse{}
	if reason := s.failure("Settle"); reason != "" {
		return nil, statusOf(reason, "the test lets this Settle fail")
	}
	for _, settlement := range request.GetSettlements() {
		result := p.queue.settle(time.Now(), p.queue.leases[settlement.GetToken()], settlement)
		answer.Results = append(answer.Results, result)
		if result.GetError() != nil {
			answer.Failed++
		}
	}
	p.change()
	if s.isLost("Settle") {
		return nil, errBroken
	}
	return answer, nil
}

// one carries out the settlement of a call for one token.
func (s *service) one(method string, settlement *pb.Settlement) (*pb.SettleResult, error) {
	defer s.lock()()
	if reason := s.failure(method); reason != "" {
		return nil, statusOf(reason, "the test lets this "+method+" fail")
	}
	p := s.proxy
	result := p.queue.settle(time.Now(), p.queue.leases[settlement.GetToken()], settlement)
	p.change()
	if s.isLost(method) {
		return nil, errBroken
	}
	if failed := result.GetError(); failed != nil {
		return nil, statusOf(failed.GetReason(), failed.GetMessage())
	}
	return result, nil
}

func (s *service) Ack(_ context.Context, request *pb.AckRequest) (*pb.AckResponse, error) {
	action := &pb.Settlement_Ack{Ack: &pb.AckAction{}}
	result, err := s.one("Ack", &pb.Settlement{Token: request.GetToken(), Action: action})
	return &pb.AckResponse{Outcome: result.GetOutcome()}, err
}

func (s *service) Nak(_ context.Context, request *pb.NakRequest) (*pb.NakResponse, error) {
	action := &pb.Settlement_Nak{Nak: &pb.NakAction{Delay: request.GetDelay()}}
	result, err := s.one("Nak", &pb.Settlement{Token: request.GetToken(), Action: action})
	return &pb.NakResponse{Outcome: result.GetOutcome()}, err
}

func (s *service) Term(_ context.Context, request *pb.TermRequest) (*pb.TermResponse, error) {
	action := &pb.Settlement_Term{Term: &pb.TermAction{Reason: request.GetReason()}}
	result, err := s.one("Term", &pb.Settlement{Token: request.GetToken(), Action: action})
	return &pb.TermResponse{Outcome: result.GetOutcome()}, err
}

func (s *service) Extend(_ context.Context, request *pb.ExtendRequest) (*pb.ExtendResponse, error) {
	action := &pb.Settlement_Extend{Extend: &pb.ExtendAction{Lease: request.GetLease()}}
	result, err := s.one("Extend", &pb.Settlement{Token: request.GetToken(), Action: action})
	return &pb.ExtendResponse{LeaseExpireTime: result.GetLeaseExpireTime(), Lease: result.GetLease()}, err
}
