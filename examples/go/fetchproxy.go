// What every worker needs around the generated client: a channel, a Fetch that is repeated until it
// is answered, and its batch, with a keeper of the leases. Says a JSON line of all that happens to a
// message. Must know nothing of the work.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
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
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "worker/gen/fetchproxy/v1"
)

const (
	// MaxBytes is the largest answer to ask for; what is received may be a little larger.
	MaxBytes = 16 << 20

	// The first wait before a call is repeated, and the longest.
	firstWait, longestWait = 100 * time.Millisecond, 5 * time.Second
	// What a Fetch has beyond its max_wait: the proxy answers well before.
	patience = 5 * time.Second
	// An empty answer that came sooner waits out the rest.
	tooSoon = 500 * time.Millisecond
	// How long an outcome may wait for others, to be settled with them.
	gather = 100 * time.Millisecond
	// Leases are not extended more often.
	shortestBeat = 50 * time.Millisecond
	// The deadline of a Settle is between them.
	shortestSettle, longestSettle = time.Second, 10 * time.Second
	// One settlement that the proxy does not take would spoil all of a call.
	mostSettlements, mostReason, longestDelay = 1000, 1024, 24 * time.Hour
)

// Transient is what handle returns for a failure that may pass: the message comes back after Delay.
type Transient struct{ Delay time.Duration }

// Poison is what handle returns for a failure that never passes: the message does not come back.
type Poison struct{ Reason string }

func (t Transient) Error() string { return fmt.Sprintf("not now, again in %v", t.Delay) }
func (p Poison) Error() string    { return p.Reason }

// Dial makes a client of "host:port", or of every address of "dns:///name:port".
func Dial(target string) (pb.FetchServiceClient, error) {
	delays := backoff.Config{BaseDelay: firstWait, Multiplier: 2, Jitter: 0.2, MaxDelay: longestWait}
	conn, err := grpc.NewClient(target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxBytes+1<<20)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 30 * time.Second, PermitWithoutStream: true,
		}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: delays, MinConnectTimeout: longestWait}),
	)
	return pb.NewFetchServiceClient(conn), err
}

// Fetch repeats the call until it is answered, or refused for good. The batch is empty once stop has
// ended; what it has, and is not begun by then, is given back.
func Fetch(
	stop context.Context, client pb.FetchServiceClient, request *pb.FetchRequest,
) (*Batch, error) {
	for attempt := 0; stop.Err() == nil; attempt++ {
		began := time.Now()
		ctx, cancel := context.WithTimeout(stop, request.GetMaxWait().AsDuration()+patience)
		answer, err := client.Fetch(ctx, request)
		cancel()
		switch trouble := troubleOf(err); {
		case err == nil:
			if len(answer.GetMessages())+len(answer.GetRejected()) == 0 {
				sleep(stop, tooSoon-time.Since(began))
			}
			return hold(stop, client, answer), nil
		case stop.Err() != nil: // The call was cancelled.
		case trouble.passes:
			sleep(stop, trouble.wait(attempt))
		default:
			return nil, trouble
		}
	}
	return hold(stop, client, nil), nil
}

func sleep(stop context.Context, wait time.Duration) {
	select {
	case <-time.After(wait):
	case <-stop.Done():
	}
}

// Batch is what one Fetch brought. Its keeper, which alone calls Settle, extends what is held and
// settles what is decided, until every lease is gone: so no outcome waits for the work on another.
type Batch struct {
	Leases []*Lease

	client pb.FetchServiceClient
	stop   context.Context
	wake   chan struct{} // Something was decided.
	done   chan struct{} // Closed when every lease is gone.
	mutex  sync.Mutex    // Over kept, and what changes of a Lease.
	kept   []*Lease      // Those that are not gone.
}

// Lease is a message in hand, and the right to settle it until the lease ends.
type Lease struct {
	*pb.Delivery

	batch      *Batch
	ctx        context.Context
	cancel     context.CancelFunc
	begun      bool
	gone       bool
	ends       time.Time
	next       time.Time      // When it is to be extended, or else settled.
	failed     int            // So many calls in a row.
	outcome    *pb.Settlement // What was decided.
	event      string         // What to say when it is settled.
	isRejected bool           // Of which all was said.
}

func hold(stop context.Context, client pb.FetchServiceClient, answer *pb.FetchResponse) *Batch {
	b := &Batch{client: client, stop: stop}
	b.wake, b.done = make(chan struct{}, 1), make(chan struct{})
	for _, message := range answer.GetMessages() {
		b.Leases = append(b.Leases, b.lease(message, message.GetLease().AsDuration()))
	}
	for _, rejected := range answer.GetRejected() {
		b.refuse(rejected)
	}
	go b.keep()
	return b
}

func (b *Batch) lease(message *pb.Delivery, left time.Duration) *Lease {
	lease := &Lease{Delivery: message, batch: b}
	lease.ctx, lease.cancel = context.WithCancel(context.Background())
	lease.lasts(time.Now(), left)
	b.kept = append(b.kept, lease)
	return lease
}

// refuse settles a rejected message that is still leased to us.
func (b *Batch) refuse(rejected *pb.Rejected) {
	message := &pb.Delivery{
		Token:          rejected.GetToken(),
		StreamSequence: rejected.GetStreamSequence(),
		DeliveryCount:  rejected.GetDeliveryCount(),
		Headers:        rejected.GetHeaders(),
	}
	log.Printf("message %d rejected: %s", message.GetStreamSequence(), rejected.GetDetail())
	tell("rejected", message)
	if message.GetToken() == "" {
		return
	}
	lease := b.lease(message, rejected.GetLease().AsDuration())
	lease.isRejected = true
	if rejected.GetCause() == pb.RejectedCause_REJECTED_CAUSE_TOO_LARGE {
		lease.Nak(time.Minute) // Perhaps another worker takes larger answers.
	} else {
		lease.Term(rejected.GetDetail())
	}
}

// Wait waits until every lease is settled, or lost.
func (b *Batch) Wait() { <-b.done }

func (b *Batch) keep() {
	defer close(b.done)
	defer context.AfterFunc(b.stop, b.giveBack)()
	for next := b.next(); !next.IsZero(); next = b.next() {
		select {
		case <-b.wake:
		case <-time.After(time.Until(next)):
			b.turn()
		}
	}
}

// next tells when the keeper has something to do; never, when every lease is gone.
func (b *Batch) next() (next time.Time) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.kept = slices.DeleteFunc(b.kept, func(lease *Lease) bool {
		if !lease.gone && lease.isOver() {
			lease.lose("by our clock, it is over")
		}
		return lease.gone
	})
	for _, lease := range b.kept {
		for _, at := range []time.Time{lease.next, lease.ends} {
			if next.IsZero() || at.Before(next) {
				next = at
			}
		}
	}
	return next
}

// turn settles and extends in one call what it is time for.
func (b *Batch) turn() {
	taken, settlements, timeout := b.take()
	if len(taken) == 0 {
		return
	}
	sent := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	answer, err := b.client.Settle(ctx, &pb.SettleRequest{Settlements: settlements})

	b.mutex.Lock()
	defer b.mutex.Unlock()
	var again []*Lease
	var reason *trouble
	failed := 0
	for i, lease := range taken {
		trouble := troubleOf(err)
		if err == nil {
			trouble = troubleIn(answer.GetResults()[i].GetError())
		}
		switch {
		case trouble == nil && lease.outcome == settlements[i]:
			lease.goes(lease.event)
		case trouble == nil:
			lease.lasts(sent, answer.GetResults()[i].GetLease().AsDuration())
		case trouble.passes:
			again, reason, failed = append(again, lease), trouble, max(failed, lease.failed)
		default:
			lease.lose(trouble.Error())
		}
	}
	if again == nil {
		return
	}
	next := time.Now().Add(reason.wait(failed))
	for _, lease := range again {
		lease.failed, lease.next = failed+1, next
	}
}

func (b *Batch) take() (taken []*Lease, settlements []*pb.Settlement, timeout time.Duration) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	timeout = longestSettle
	for _, lease := range b.kept {
		if lease.isDue() && len(taken) < mostSettlements {
			taken = append(taken, lease)
			settlements = append(settlements, lease.settlement())
			timeout = min(timeout, time.Until(lease.ends)/2)
		}
	}
	return taken, settlements, max(timeout, shortestSettle)
}

// giveBack is for what is not begun, but a last attempt: a Nak would be the end of its message.
func (b *Batch) giveBack() {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for _, lease := range b.kept {
		if !lease.begun && !lease.isLastAttempt() {
			lease.decide("returned", nak(0))
		}
	}
}

// Begin tells whether to work on the message: not where it is lost, or given back.
func (l *Lease) Begin() bool {
	l.batch.mutex.Lock()
	defer l.batch.mutex.Unlock()
	isGivenBack := l.batch.stop.Err() != nil && !l.isLastAttempt()
	l.begun = !l.gone && !l.isOver() && !isGivenBack
	return l.begun
}

// Context ends when the lease is lost.
func (l *Lease) Context() context.Context { return l.ctx }

// Ack decides that the message is done. The keeper carries out what was decided.
func (l *Lease) Ack() {
	l.end("acked", &pb.Settlement{Action: &pb.Settlement_Ack{Ack: &pb.AckAction{}}})
}

// Nak decides that the message is to come back after the delay.
func (l *Lease) Nak(delay time.Duration) { l.end("nacked", nak(delay)) }

// Term decides that the message is not to come back.
func (l *Lease) Term(reason string) {
	reason = strings.ToValidUTF8(reason[:min(len(reason), mostReason)], "")
	action := &pb.Settlement_Term{Term: &pb.TermAction{Reason: reason}}
	l.end("termed", &pb.Settlement{Action: action})
}

func nak(delay time.Duration) *pb.Settlement {
	action := &pb.NakAction{Delay: durationpb.New(max(0, min(delay, longestDelay)))}
	return &pb.Settlement{Action: &pb.Settlement_Nak{Nak: action}}
}

func (l *Lease) end(event string, outcome *pb.Settlement) {
	l.batch.mutex.Lock()
	defer l.batch.mutex.Unlock()
	l.decide(event, outcome)
}

// The mutex is held by those who call what follows.

func (l *Lease) decide(event string, outcome *pb.Settlement) {
	if l.gone || l.outcome != nil {
		return
	}
	outcome.Token = l.GetToken()
	l.event, l.outcome, l.failed, l.next = event, outcome, 0, time.Now()
	isHeld := func(lease *Lease) bool { return lease.outcome == nil }
	if slices.ContainsFunc(l.batch.kept, isHeld) {
		l.next = l.next.Add(gather)
	}
	select {
	case l.batch.wake <- struct{}{}:
	default: // It will wake anyway.
	}
}

// isDue takes along what would be due soon; but what failed waits its time out.
func (l *Lease) isDue() bool {
	early := gather
	if l.failed > 0 {
		early = 0
	}
	return time.Until(l.next) <= early && !l.isOver()
}

func (l *Lease) isOver() bool { return time.Until(l.ends) <= 0 }

func (l *Lease) isLastAttempt() bool {
	return l.GetMaxDeliver() > 0 && l.GetDeliveryCount() >= l.GetMaxDeliver()
}

// settlement is what was decided, or else an Extend.
func (l *Lease) settlement() *pb.Settlement {
	if l.outcome != nil {
		return l.outcome
	}
	// Without a length it lasts for as long as it was granted.
	extend := &pb.Settlement_Extend{Extend: &pb.ExtendAction{}}
	return &pb.Settlement{Token: l.GetToken(), Action: extend}
}

func (l *Lease) lasts(from time.Time, left time.Duration) {
	l.ends, l.failed = from.Add(left), 0
	if l.outcome == nil { // Or else it was decided meanwhile.
		l.next = time.Now().Add(max(time.Until(l.ends)/3, shortestBeat))
	}
}

func (l *Lease) lose(why string) {
	log.Printf("message %d lost: %s", l.GetStreamSequence(), why)
	l.goes("lost")
}

func (l *Lease) goes(event string) {
	l.gone = true
	l.cancel()
	if !l.isRejected {
		tell(event, l.Delivery)
	}
}

// What an error means for its call.
type trouble struct {
	reason, message string
	passes          bool          // Whether to repeat the call.
	delay           time.Duration // After how long at least, if the proxy said so.
}

func (t *trouble) Error() string { return t.reason + ": " + t.message }

// With these, the same call would be refused again.
var refusals = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.PermissionDenied,
	codes.Unauthenticated, codes.Unimplemented,
}

// An error without a reason was made on the way: its code alone tells.
func troubleOf(err error) *trouble {
	if err == nil {
		return nil
	}
	failed := status.Convert(err)
	trouble := &trouble{
		reason:  code.Code(failed.Code()).String(),
		message: failed.Message(),
		passes:  !slices.Contains(refusals, failed.Code()),
	}
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == "fetchproxy" {
				trouble.reason = detail.GetReason()
			}
		case *errdetails.RetryInfo:
			trouble.delay = detail.GetRetryDelay().AsDuration()
		}
	}
	return trouble
}

func troubleIn(refusal *pb.SettleError) *trouble {
	if refusal == nil {
		return nil
	}
	return &trouble{
		reason:  refusal.GetReason(),
		message: refusal.GetMessage(),
		passes:  refusal.GetRetryDelay() != nil || refusal.GetReason() == "SETTLE_UNCONFIRMED",
		delay:   refusal.GetRetryDelay().AsDuration(),
	}
}

// wait tells how long to wait before the call is repeated, and says so. There is some chance in it,
// for workers that failed together must not come back together.
func (t *trouble) wait(failed int) time.Duration {
	most := min(firstWait<<min(failed, 6), longestWait)
	wait := min(t.delay, longestWait) + most/2 + rand.N(most/2)
	Say(Line{Event: "retry", Reason: t.reason, In: wait.Seconds()})
	return wait
}

// Line is one line of standard output, as JSON.
type Line struct {
	Event      string              `json:"event"`
	Sequence   uint64              `json:"sequence,omitempty"`
	Deliveries uint32              `json:"deliveries,omitempty"`
	ID         json.RawMessage     `json:"id,omitempty"`
	Headers    map[string][]string `json:"headers,omitempty"`
	Reason     string              `json:"reason,omitempty"`
	In         float64             `json:"in,omitempty"`
}

// Say may be called at any time, by anybody.
func Say(line Line) { _ = json.NewEncoder(os.Stdout).Encode(line) }

// tell says what became of a message, by the id that it has in its payload, if any.
func tell(event string, message *pb.Delivery) {
	line := Line{
		Event:      event,
		Sequence:   message.GetStreamSequence(),
		Deliveries: message.GetDeliveryCount(),
		Headers:    map[string][]string{},
	}
	_ = json.Unmarshal([]byte(message.GetText()), &struct{ ID *json.RawMessage }{&line.ID})
	for name, values := range message.GetHeaders() {
		line.Headers[name] = values.GetValues()
	}
	Say(line)
}
