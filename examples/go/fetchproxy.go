// What every worker needs around the generated client: which errors are worth repeating a call and
// after how long, a heartbeat that keeps leases, and settling with the same token until it is done.
package main

import (
	"context"
	"fmt"
	"log"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "worker/gen/fetchproxy/v1"
)

const (
	// MaxBytes is the largest answer that is asked for, and taken.
	MaxBytes = 16 << 20

	// The first wait before a call is repeated, if the proxy names none, and the longest.
	firstWait, longestWait = 100 * time.Millisecond, 5 * time.Second
	// What a Fetch has beyond its max_wait, and a settlement at all: the proxy answers well before.
	patience = 10 * time.Second
	// An empty answer that came sooner is followed by a pause.
	tooSoon, pause = time.Second, 500 * time.Millisecond
	// The proxy grants no shorter lease to those who ask.
	shortestLease = time.Second
	// Nor does it take a longer delay; one settlement that it does not take spoils the whole call.
	longestDelay = 24 * time.Hour
)

// Transient is what handle returns for a failure that may pass: the message comes back after Delay.
type Transient struct{ Delay time.Duration }

// Poison is what handle returns for a failure that never passes: the message does not come back.
type Poison struct{ Reason string }

func (t Transient) Error() string { return fmt.Sprintf("not now, again in %v", t.Delay) }
func (p Poison) Error() string    { return p.Reason }

// Proxy is a connection to fetch-proxy.
type Proxy struct {
	conn    *grpc.ClientConn
	client  pb.FetchServiceClient
	onRetry func(reason string, wait time.Duration)
}

// Dial prepares a connection to the first address that answers. A single one may be any target that
// gRPC knows, as "dns:///fetch-proxy:50051". onRetry is called before each wait after an error.
func Dial(addresses []string, onRetry func(reason string, wait time.Duration)) (*Proxy, error) {
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxBytes)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{
			BaseDelay: firstWait, Multiplier: 2, Jitter: 0.2, MaxDelay: longestWait,
		}}),
	}
	target := addresses[0]
	if len(addresses) > 1 {
		list := manual.NewBuilderWithScheme("list")
		var state resolver.State
		for _, address := range addresses {
			state.Addresses = append(state.Addresses, resolver.Address{Addr: address})
		}
		list.InitialState(state)
		target = "list:///"
		options = append(options, grpc.WithResolvers(list), grpc.WithAuthority(addresses[0]))
	}
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, err
	}
	return &Proxy{conn, pb.NewFetchServiceClient(conn), onRetry}, nil
}

// Close closes the connection.
func (p *Proxy) Close() error { return p.conn.Close() }

// Fetch repeats the call until it is answered, or refused for good. When ctx ends, the answer is
// nil, which is a valid empty one.
func (p *Proxy) Fetch(ctx context.Context, request *pb.FetchRequest) (*pb.FetchResponse, error) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		began := time.Now()
		answer, err := p.fetch(ctx, request)
		if err == nil {
			nothing := len(answer.GetMessages())+len(answer.GetRejected()) == 0
			if nothing && time.Since(began) < tooSoon {
				sleep(ctx, pause)
			}
			return answer, nil
		}
		if ctx.Err() == nil {
			trouble := troubleOf(err)
			if !trouble.passes {
				return nil, err
			}
			p.wait(ctx, trouble, attempt)
		}
	}
	return nil, nil
}

func (p *Proxy) fetch(ctx context.Context, request *pb.FetchRequest) (*pb.FetchResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, request.GetMaxWait().AsDuration()+patience)
	defer cancel()
	return p.client.Fetch(ctx, request)
}

func (p *Proxy) settle(
	ctx context.Context, timeout time.Duration, settlements []*pb.Settlement,
) ([]*pb.SettleResult, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	answer, err := p.client.Settle(ctx, &pb.SettleRequest{Settlements: settlements})
	return answer.GetResults(), err
}

// Refuse settles a rejected message that is still leased to us. Should that fail, the lease ends by
// itself, and the message is rejected again.
func (p *Proxy) Refuse(rejected *pb.Rejected) {
	if rejected.GetToken() == "" {
		return
	}
	settlement := term(rejected.GetDetail())
	if rejected.GetCause() == pb.RejectedCause_REJECTED_CAUSE_TOO_LARGE {
		settlement = nak(time.Minute) // Perhaps there is a worker with a larger MaxBytes.
	}
	settlement.Token = rejected.GetToken()
	if _, err := p.settle(context.Background(), patience, []*pb.Settlement{settlement}); err != nil {
		log.Printf("message %d: %v", rejected.GetStreamSequence(), err)
	}
}

// wait passes the time that the error asks for, or else more each time. There is some chance in it,
// for workers that failed together must not come back together.
func (p *Proxy) wait(ctx context.Context, trouble trouble, attempt int) {
	least := trouble.delay
	if least == 0 {
		least = firstWait << min(attempt, 6) / 2
	}
	wait := min(least+rand.N(least), longestWait)
	p.onRetry(trouble.reason, wait)
	sleep(ctx, wait)
}

// Batch is what one Fetch brought. A heartbeat keeps its leases until they are settled.
type Batch struct {
	Leases []*Lease

	proxy   *Proxy
	release context.CancelFunc
	waiting time.Time  // Since when a decision waits for Settle; zero if none does.
	mutex   sync.Mutex // Over what changes of the leases, for the heartbeat uses it, too.
}

// Hold takes the messages of an answer in hand, and starts their heartbeat.
func (p *Proxy) Hold(messages []*pb.Delivery) *Batch {
	ctx, release := context.WithCancel(context.Background())
	batch := &Batch{proxy: p, release: release}
	for _, message := range messages {
		lease := &Lease{Delivery: message, batch: batch, kept: true}
		lease.ends = time.Now().Add(message.GetLease().AsDuration())
		lease.ctx, lease.cancel = context.WithCancel(ctx)
		batch.Leases = append(batch.Leases, lease)
	}
	go batch.beat(ctx)
	return batch
}

// Release ends the heartbeat. Leases that are not settled end by themselves.
func (b *Batch) Release() { b.release() }

// Waited tells for how long the oldest decision has been waiting for Settle.
func (b *Batch) Waited() time.Duration {
	if b.waiting.IsZero() {
		return 0
	}
	return time.Since(b.waiting)
}

// Settle carries out what was decided, and returns it together with what was lost. It goes on until
// each is done, refused for good, or over: every settlement may be repeated with the same token.
func (b *Batch) Settle() []*Lease {
	b.waiting = time.Time{}
	taken := b.pick(b.Leases, (*Lease).take)
	for attempt := 0; ; attempt++ {
		open := b.pick(taken, (*Lease).open)
		if len(open) == 0 {
			return taken
		}
		if trouble := b.settle(open); trouble.passes {
			b.proxy.wait(context.Background(), trouble, attempt)
		}
	}
}

// settle returns the trouble of what is to be repeated.
func (b *Batch) settle(open []*Lease) (again trouble) {
	settlements := make([]*pb.Settlement, len(open))
	for i, lease := range open {
		settlements[i] = lease.settlement
	}
	results, err := b.proxy.settle(context.Background(), patience, settlements)
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for i, lease := range open {
		var trouble trouble
		if err != nil {
			trouble = troubleOf(err)
		} else if refusal := results[i].GetError(); refusal != nil {
			trouble = troubleIn(refusal)
		} else {
			lease.settlement = nil
			continue
		}
		if trouble.passes {
			again = trouble
		} else {
			lease.lose(trouble.reason)
		}
	}
	return again
}

// beat extends the leases whenever a third of what is left of the shortest has passed.
func (b *Batch) beat(ctx context.Context) {
	for {
		kept := b.pick(b.Leases, (*Lease).held)
		if len(kept) == 0 || !sleep(ctx, max(shortest(kept)/3, 20*time.Millisecond)) {
			return
		}
		b.extend(ctx, b.pick(kept, (*Lease).held))
	}
}

// extend is not repeated if it fails: the next beat comes soon enough.
func (b *Batch) extend(ctx context.Context, kept []*Lease) {
	if len(kept) == 0 {
		return
	}
	extensions := make([]*pb.Settlement, len(kept))
	for i, lease := range kept {
		length := durationpb.New(max(lease.GetLease().AsDuration(), shortestLease))
		extend := &pb.Settlement_Extend{Extend: &pb.ExtendAction{Lease: length}}
		extensions[i] = &pb.Settlement{Token: lease.GetToken(), Action: extend}
	}
	timeout := max(shortest(kept)/2, 100*time.Millisecond)
	results, err := b.proxy.settle(ctx, timeout, extensions)
	if err != nil {
		if ctx.Err() == nil {
			log.Printf("no heartbeat: %v", err)
		}
		return
	}
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for i, lease := range kept {
		refusal := results[i].GetError()
		switch {
		case !lease.kept: // It is being settled, and may have been refused for that.
		case refusal == nil:
			lease.ends = time.Now().Add(results[i].GetLease().AsDuration())
		case !troubleIn(refusal).passes:
			lease.lose(refusal.GetReason())
		}
	}
}

func (b *Batch) pick(leases []*Lease, wanted func(*Lease) bool) (picked []*Lease) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for _, lease := range leases {
		if wanted(lease) {
			picked = append(picked, lease)
		}
	}
	return picked
}

func shortest(leases []*Lease) time.Duration {
	first := slices.MinFunc(leases, func(a, b *Lease) int { return a.ends.Compare(b.ends) })
	return time.Until(first.ends)
}

// An Outcome is how a message ended for this worker.
type Outcome string

const (
	Acked    Outcome = "acked"
	Nacked   Outcome = "nacked"
	Termed   Outcome = "termed"
	Returned Outcome = "returned" // Not begun, and given back.
	Lost     Outcome = "lost"     // The lease was over: another worker has the message, or will.
)

// Lease is a message in hand, and the right to settle it until the lease ends.
type Lease struct {
	*pb.Delivery

	batch      *Batch
	ctx        context.Context
	cancel     context.CancelFunc
	ends       time.Time
	kept       bool // By the heartbeat, until it is being settled.
	outcome    Outcome
	settlement *pb.Settlement // What was decided, until it is settled.
}

// Context ends when the lease is lost.
func (l *Lease) Context() context.Context { return l.ctx }

// Lost tells whether another worker may have the message: work on it would be done twice.
func (l *Lease) Lost() bool {
	l.batch.mutex.Lock()
	defer l.batch.mutex.Unlock()
	return l.lost()
}

// Outcome may be asked for when Settle has returned the lease.
func (l *Lease) Outcome() Outcome { return l.outcome }

// Ack decides that the message is done. Settle carries out what was decided.
func (l *Lease) Ack() {
	l.decide(Acked, &pb.Settlement{Action: &pb.Settlement_Ack{Ack: &pb.AckAction{}}})
}

// Nak decides that the message is to come back after the delay.
func (l *Lease) Nak(delay time.Duration) { l.decide(Nacked, nak(delay)) }

// Term decides that the message is not to come back.
func (l *Lease) Term(reason string) { l.decide(Termed, term(reason)) }

// Return decides that the message is for another worker, at once.
func (l *Lease) Return() { l.decide(Returned, nak(0)) }

func (l *Lease) decide(outcome Outcome, settlement *pb.Settlement) {
	l.batch.mutex.Lock()
	defer l.batch.mutex.Unlock()
	if l.lost() {
		return
	}
	settlement.Token = l.GetToken()
	l.outcome, l.settlement = outcome, settlement
	if l.batch.waiting.IsZero() {
		l.batch.waiting = time.Now()
	}
}

// The mutex is held by those who call what follows.

// take takes from the heartbeat what is to be settled, or lost.
func (l *Lease) take() bool {
	taken := l.kept && (l.lost() || l.settlement != nil)
	l.kept = l.kept && !taken
	return taken
}

func (l *Lease) open() bool { return l.settlement != nil && !l.lost() }
func (l *Lease) held() bool { return l.kept && !l.lost() }

func (l *Lease) lost() bool {
	if l.outcome != Lost && time.Now().After(l.ends) {
		l.lose("by our clock, it is over")
	}
	return l.outcome == Lost
}

func (l *Lease) lose(why string) {
	log.Printf("lease of message %d lost: %s", l.GetStreamSequence(), why)
	l.outcome, l.settlement = Lost, nil
	l.cancel()
}

// What an error means for its call.
type trouble struct {
	reason string
	passes bool          // Whether to repeat the call.
	delay  time.Duration // After how long; zero if the proxy did not say.
}

// With these, the same call would be refused again.
var refusals = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.PermissionDenied,
	codes.Unauthenticated, codes.Unimplemented,
}

// An error without a reason was made on the way: its code alone tells.
func troubleOf(err error) trouble {
	failed := status.Convert(err)
	trouble := trouble{
		reason: code.Code(failed.Code()).String(),
		passes: !slices.Contains(refusals, failed.Code()),
	}
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			trouble.reason = detail.GetReason()
		case *errdetails.RetryInfo:
			trouble.delay = detail.GetRetryDelay().AsDuration()
		}
	}
	return trouble
}

func troubleIn(refusal *pb.SettleError) trouble {
	return trouble{
		reason: refusal.GetReason(),
		passes: refusal.GetRetryDelay() != nil || refusal.GetReason() == "SETTLE_UNCONFIRMED",
		delay:  refusal.GetRetryDelay().AsDuration(),
	}
}

func nak(delay time.Duration) *pb.Settlement {
	action := &pb.NakAction{Delay: durationpb.New(max(0, min(delay, longestDelay)))}
	return &pb.Settlement{Action: &pb.Settlement_Nak{Nak: action}}
}

func term(reason string) *pb.Settlement {
	action := &pb.TermAction{Reason: strings.ToValidUTF8(reason, "?")}
	return &pb.Settlement{Action: &pb.Settlement_Term{Term: action}}
}

// sleep tells whether it slept for all that time.
func sleep(ctx context.Context, wait time.Duration) bool {
	select {
	case <-time.After(wait):
		return true
	case <-ctx.Done():
		return false
	}
}
