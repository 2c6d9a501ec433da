// What every worker needs around the generated client: which errors are worth repeating a call and
// after how long, a heartbeat that keeps leases, and settling with the same token until it is done.
package main

import (
	"context"
	"log"
	"math/rand/v2"
	"slices"
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

	// The first wait before a call is repeated, if the proxy does not say how long, and the longest.
	firstWait, longestWait = 100 * time.Millisecond, 5 * time.Second
	// What a Fetch has beyond its max_wait, and a settlement at all: the proxy answers well before.
	patience = 10 * time.Second
	// An empty answer that came sooner is followed by a pause.
	tooSoon, pause = time.Second, 500 * time.Millisecond
	// The proxy grants no shorter lease to those who ask.
	shortestLease = time.Second
)

// Proxy is a connection to fetch-proxy.
type Proxy struct {
	conn    *grpc.ClientConn
	client  pb.FetchServiceClient
	onRetry func(reason string, wait time.Duration)
}

// Dial makes a connection to the first address that answers. A single one may be any target that
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
		target, options = "list:///", append(options, grpc.WithResolvers(list))
	}
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, err
	}
	return &Proxy{conn, pb.NewFetchServiceClient(conn), onRetry}, nil
}

// Close closes the connection.
func (p *Proxy) Close() error { return p.conn.Close() }

// Fetch repeats the call until it is answered, or refused for good. Its answer is empty when ctx
// ends.
func (p *Proxy) Fetch(ctx context.Context, request *pb.FetchRequest) (*pb.FetchResponse, error) {
	for attempt := 0; ; attempt++ {
		began := time.Now()
		call, cancel := context.WithTimeout(ctx, request.GetMaxWait().AsDuration()+patience)
		answer, err := p.client.Fetch(call, request)
		cancel()
		if ctx.Err() != nil {
			return answer, nil // Getters of a nil message are fine.
		}
		if err == nil {
			empty := answer.GetEmptyReason() != pb.EmptyReason_EMPTY_REASON_UNSPECIFIED
			if empty && time.Since(began) < tooSoon {
				sleep(ctx, pause)
			}
			return answer, nil
		}
		trouble := troubleOf(err)
		if !trouble.passes {
			return nil, err
		}
		p.wait(ctx, trouble, attempt)
	}
}

// Refuse settles a rejected message that is still leased to us. Should that fail, the lease ends by
// itself, and the message is rejected again.
func (p *Proxy) Refuse(rejected *pb.Rejected) {
	if rejected.GetToken() == "" {
		return
	}
	settlement := term(rejected.GetDetail())
	if rejected.GetCause() == pb.RejectedCause_REJECTED_CAUSE_TOO_LARGE {
		// Perhaps there is a worker with a larger MaxBytes.
		settlement = nak(time.Minute)
	}
	settlement.Token = rejected.GetToken()
	if _, err := p.settle(context.Background(), patience, []*pb.Settlement{settlement}); err != nil {
		log.Printf("message %d: %v", rejected.GetStreamSequence(), err)
	}
}

func (p *Proxy) settle(
	ctx context.Context, timeout time.Duration, settlements []*pb.Settlement,
) ([]*pb.SettleResult, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	answer, err := p.client.Settle(ctx, &pb.SettleRequest{Settlements: settlements})
	return answer.GetResults(), err
}

func nak(delay time.Duration) *pb.Settlement {
	nak := &pb.NakAction{Delay: durationpb.New(delay)}
	return &pb.Settlement{Action: &pb.Settlement_Nak{Nak: nak}}
}

func term(reason string) *pb.Settlement {
	return &pb.Settlement{Action: &pb.Settlement_Term{Term: &pb.TermAction{Reason: reason}}}
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

// An Outcome is how a message ended for this worker.
type Outcome string

const (
	Acked    Outcome = "acked"
	Nacked   Outcome = "nacked"
	Termed   Outcome = "termed"
	Returned Outcome = "returned" // Not begun, and given back.
	Lost     Outcome = "lost"     // The lease was over: another worker has the message, or will.
)

// Batch is what one Fetch brought. A heartbeat keeps its leases until they are settled.
type Batch struct {
	Leases []*Lease

	proxy   *Proxy
	stop    context.CancelFunc
	waiting time.Time  // Since when an outcome waits to be settled; zero if none does.
	mutex   sync.Mutex // Over the changing parts of the leases.
}

// Lease is a message in hand, and the right to settle it until the lease ends.
type Lease struct {
	*pb.Delivery

	batch      *Batch
	ctx        context.Context
	cancel     context.CancelFunc
	ends       time.Time
	kept       bool // By the heartbeat: until it is being settled.
	outcome    Outcome
	settlement *pb.Settlement
}

// Hold starts the heartbeat of a batch.
func (p *Proxy) Hold(messages []*pb.Delivery) *Batch {
	batch := &Batch{proxy: p}
	for _, message := range messages {
		ctx, cancel := context.WithCancel(context.Background())
		ends := time.Now().Add(message.GetLease().AsDuration())
		batch.Leases = append(batch.Leases, &Lease{
			Delivery: message, batch: batch, ctx: ctx, cancel: cancel, ends: ends, kept: true,
		})
	}
	ctx, stop := context.WithCancel(context.Background())
	batch.stop = stop
	go batch.beat(ctx)
	return batch
}

// Release ends the heartbeat. Leases that are not settled end by themselves.
func (b *Batch) Release() {
	b.stop()
	for _, lease := range b.Leases {
		lease.cancel()
	}
}

// Context ends when the lease does.
func (l *Lease) Context() context.Context { return l.ctx }

// Lost tells whether the lease is over. The work would be done twice.
func (l *Lease) Lost() bool {
	l.batch.mutex.Lock()
	defer l.batch.mutex.Unlock()
	return l.over()
}

// Outcome tells how the message ended; it is certain once Settle has returned it.
func (l *Lease) Outcome() Outcome { return l.outcome }

// Ack decides that the message is done. Settle carries it out, as with all decisions.
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
	if l.outcome == Lost {
		return
	}
	settlement.Token = l.GetToken()
	l.outcome, l.settlement = outcome, settlement
	if l.batch.waiting.IsZero() {
		l.batch.waiting = time.Now()
	}
}

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
	taken := b.takeDecided()
	for attempt := 0; ; attempt++ {
		open := unsettled(taken)
		if len(open) == 0 {
			return taken
		}
		settlements := make([]*pb.Settlement, len(open))
		for i, lease := range open {
			settlements[i] = lease.settlement
		}
		results, err := b.proxy.settle(context.Background(), patience, settlements)
		if trouble := note(open, results, err); trouble.passes {
			b.proxy.wait(context.Background(), trouble, attempt)
		}
	}
}

// takeDecided takes from the heartbeat what is to be settled, and what is lost.
func (b *Batch) takeDecided() (taken []*Lease) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.waiting = time.Time{}
	for _, lease := range b.Leases {
		if lease.kept && lease.outcome != "" {
			lease.kept = false
			taken = append(taken, lease)
		}
	}
	return taken
}

func unsettled(taken []*Lease) (open []*Lease) {
	for _, lease := range taken {
		if lease.settlement != nil && !lease.over() {
			open = append(open, lease)
		}
	}
	return open
}

// note notes what became of each settlement, and returns the trouble of those to be repeated.
func note(open []*Lease, results []*pb.SettleResult, err error) (again trouble) {
	if err != nil {
		again = troubleOf(err)
	}
	for i, lease := range open {
		switch {
		case err != nil && again.passes:
		case err != nil:
			lease.lose(err.Error())
		case results[i].GetError() == nil:
			lease.settlement = nil
		default:
			if trouble := troubleIn(results[i].GetError()); !trouble.passes {
				lease.lose(results[i].GetError().GetMessage())
			} else if trouble.delay >= again.delay {
				again = trouble
			}
		}
	}
	return again
}

func (l *Lease) over() bool {
	if l.outcome != Lost && time.Now().After(l.ends) {
		l.lose("by our clock, its lease is over")
	}
	return l.outcome == Lost
}

func (l *Lease) lose(why string) {
	log.Printf("message %d is lost: %s", l.GetStreamSequence(), why)
	l.outcome, l.settlement = Lost, nil
	l.cancel()
}

// beat extends the leases of the batch whenever a third of what is left of the shortest has passed.
func (b *Batch) beat(ctx context.Context) {
	for {
		kept, left := b.stillKept()
		if len(kept) == 0 || !sleep(ctx, max(left/3, 20*time.Millisecond)) {
			return
		}
		kept, left = b.stillKept()
		if len(kept) > 0 {
			b.extend(ctx, kept, max(left/2, 100*time.Millisecond))
		}
	}
}

// stillKept lists what is to be extended, and what is left of the shortest.
func (b *Batch) stillKept() (kept []*Lease, left time.Duration) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for _, lease := range b.Leases {
		if lease.kept && !lease.over() {
			if ends := time.Until(lease.ends); len(kept) == 0 || ends < left {
				left = ends
			}
			kept = append(kept, lease)
		}
	}
	return kept, left
}

// extend is not repeated if it fails: the next beat comes soon enough.
func (b *Batch) extend(ctx context.Context, leases []*Lease, timeout time.Duration) {
	extensions := make([]*pb.Settlement, len(leases))
	for i, lease := range leases {
		length := durationpb.New(max(lease.GetLease().AsDuration(), shortestLease))
		extensions[i] = &pb.Settlement{
			Token:  lease.GetToken(),
			Action: &pb.Settlement_Extend{Extend: &pb.ExtendAction{Lease: length}},
		}
	}
	results, err := b.proxy.settle(ctx, timeout, extensions)
	if err != nil {
		log.Printf("no heartbeat: %v", err)
		return
	}
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for i, lease := range leases {
		refused := results[i].GetError()
		switch {
		case !lease.kept: // It is being settled, which may be why it was refused.
		case refused == nil:
			lease.ends = time.Now().Add(results[i].GetLease().AsDuration())
		case !troubleIn(refused).passes:
			lease.lose(refused.GetMessage())
		}
	}
}

// What an error means for the call: its reason, whether it passes, and if so when.
type trouble struct {
	reason string
	passes bool
	delay  time.Duration // Zero if the proxy did not say.
}

// An error without a reason was made on the way: its code alone tells, also with reasons that are
// not known yet.
func troubleOf(err error) trouble {
	is := status.Convert(err)
	trouble := trouble{reason: code.Code(is.Code()).String(), passes: !slices.Contains(refusals, is.Code())}
	for _, detail := range is.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			trouble.reason = detail.GetReason()
		case *errdetails.RetryInfo:
			trouble.delay = detail.GetRetryDelay().AsDuration()
		}
	}
	return trouble
}

func troubleIn(refused *pb.SettleError) trouble {
	return trouble{
		reason: refused.GetReason(),
		passes: refused.GetRetryDelay() != nil || refused.GetReason() == "SETTLE_UNCONFIRMED",
		delay:  refused.GetRetryDelay().AsDuration(),
	}
}

// The same call would be refused again.
var refusals = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.PermissionDenied,
	codes.Unauthenticated, codes.Unimplemented,
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
