// The part of a worker around the generated client: a channel, a Fetch that is repeated until it is
// answered, and its batch, with a keeper of the leases. Prints a JSON line for each event of a message.
// It must know nothing of the work.
package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log"
	random "math/rand/v2"
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
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "worker/gen/fetchproxy/v1"
)

const (
	// MaxBytes is the largest answer to ask for. The received answer may be a little larger.
	MaxBytes = 16 << 20

	// The first wait before a call is repeated, and the longest wait.
	firstWait, longestWait = 100 * time.Millisecond, 5 * time.Second
	// A Fetch has this time in addition to its max_wait. The proxy answers well before.
	patience = 5 * time.Second
	// After an empty answer that came sooner, the worker waits for the rest of this time.
	tooSoon = 500 * time.Millisecond
	// How long an outcome may wait for others, to be settled in the same call.
	gather = 100 * time.Millisecond
	// Leases are not extended more often.
	shortestBeat = 50 * time.Millisecond
	// The deadline of a GiveBack.
	farewell = time.Second
	// The shortest and the longest deadline of a Settle.
	shortestSettle, longestSettle = time.Second, 10 * time.Second
	// One settlement that the proxy refuses would fail the whole call.
	mostSettlements, mostReason, longestDelay = 1000, 1024, 24 * time.Hour
)

// Transient is the error of handle for a temporary failure: the message comes back after Delay.
type Transient struct{ Delay time.Duration }

// Poison is the error of handle for a permanent failure: the message does not come back.
type Poison struct{ Reason string }

func (t Transient) Error() string { return fmt.Sprintf("not now, again in %v", t.Delay) }
func (p Poison) Error() string    { return p.Reason }

// Outcome says how a message is settled.
type Outcome struct {
	event      string         // The event to print when it is settled.
	settlement *pb.Settlement // Without the name of a message.
}

// Ack says that the message is done.
func Ack() Outcome {
	return Outcome{"acked", &pb.Settlement{Action: &pb.Settlement_Ack{Ack: &pb.AckAction{}}}}
}

// Nak says that the message is to come back after the delay.
func Nak(delay time.Duration) Outcome {
	nak := &pb.NakAction{Delay: durationpb.New(max(0, min(delay, longestDelay)))}
	return Outcome{"nacked", &pb.Settlement{Action: &pb.Settlement_Nak{Nak: nak}}}
}

// Term says that the message is not to come back.
func Term(reason string) Outcome {
	term := &pb.TermAction{Reason: strings.ToValidUTF8(reason[:min(len(reason), mostReason)], "")}
	return Outcome{"termed", &pb.Settlement{Action: &pb.Settlement_Term{Term: term}}}
}

// Dial makes a client for "host:port", for "https://host:port" with TLS, or for every address of
// "dns:///name:port". The environment names the files of its credentials.
func Dial(address string) (pb.FetchServiceClient, error) {
	target, hasTLS := strings.CutPrefix(address, "https://")
	transport := insecure.NewCredentials()
	if hasTLS {
		config, err := tlsConfig()
		if err != nil {
			return nil, err
		}
		transport = credentials.NewTLS(config)
	}
	delays := backoff.Config{BaseDelay: firstWait, Multiplier: 2, Jitter: 0.2, MaxDelay: longestWait}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxBytes + 1<<20)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 30 * time.Second, PermitWithoutStream: true,
		}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: delays, MinConnectTimeout: longestWait}),
	}
	if file := os.Getenv("FETCH_PROXY_BEARER_FILE"); file != "" {
		if !hasTLS && !isHere(target) {
			return nil, fmt.Errorf("a credential is not sent to %s without TLS: use https://", address)
		}
		options = append(options, grpc.WithPerRPCCredentials(bearer(file)))
	}
	conn, err := grpc.NewClient(target, options...)
	return pb.NewFetchServiceClient(conn), err
}

// tlsConfig reads the certificate of the client for each connection.
func tlsConfig() (*tls.Config, error) {
	config := &tls.Config{}
	if file := os.Getenv("FETCH_PROXY_CA"); file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		config.RootCAs.AppendCertsFromPEM(pem)
	}
	if file := os.Getenv("FETCH_PROXY_CERT"); file != "" {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(file, os.Getenv("FETCH_PROXY_KEY"))
			return &pair, err
		}
	}
	return config, nil
}

func isHere(target string) bool {
	host := strings.TrimPrefix(target, "dns:///")
	isBegin := func(begin string) bool { return strings.HasPrefix(host, begin) }
	return slices.ContainsFunc([]string{"localhost:", "127.0.0.1:", "[::1]:"}, isBegin)
}

// bearer is the file of the token, which is read for each call.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := os.ReadFile(string(b))
	return map[string]string{"authorization": "Bearer " + strings.TrimSpace(string(token))}, err
}

// RequireTransportSecurity is false for the sake of this machine: see Dial.
func (b bearer) RequireTransportSecurity() bool { return false }

// Fetch repeats the call until it is answered or permanently refused. The repeats have one name, so they
// get the messages of an answer that was lost. The batch is empty if stop has ended. When stop ends, the
// batch gives back all messages that are not begun.
func Fetch(
	stop context.Context, client pb.FetchServiceClient, request *pb.FetchRequest,
) (*Batch, error) {
	request.AttemptId = rand.Text()
	for attempt := 0; stop.Err() == nil; attempt++ {
		request.AttemptAgain = attempt > 0
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
	giveBack(client, request)
	return hold(stop, client, nil), nil
}

// giveBack returns the messages of a Fetch whose answer nobody reads. If it fails, they come back when
// their leases end.
func giveBack(client pb.FetchServiceClient, request *pb.FetchRequest) {
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	_, err := client.GiveBack(ctx, &pb.GiveBackRequest{
		Stream: request.Stream, Consumer: request.Consumer, AttemptId: request.AttemptId,
	})
	if err != nil {
		log.Printf("the last Fetch is not given back: %v", err)
	}
}

func sleep(stop context.Context, wait time.Duration) {
	select {
	case <-time.After(wait):
	case <-stop.Done():
	}
}

// Batch has the messages of one Fetch. Only its keeper calls Settle. The keeper extends the leases and
// settles the outcomes until every lease is gone. So no outcome waits for the work on another message.
type Batch struct {
	Leases []*Lease

	client pb.FetchServiceClient
	stop   context.Context
	wake   chan struct{} // Something was decided.
	done   chan struct{} // Closed when every lease is gone.
	mutex  sync.Mutex    // Guards kept, and the fields of a Lease that change.
	kept   []*Lease      // The leases that are not gone.
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
	next       time.Time      // When to extend or settle it.
	failed     int            // The number of failed calls in a row.
	outcome    *pb.Settlement // The outcome, once decided.
	event      string         // The event to print when it is settled.
	isRejected bool           // The event was printed already.
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

// refuse settles a rejected message that is still leased to this worker.
func (b *Batch) refuse(rejected *pb.Rejected) {
	message, outcome := reject(rejected)
	if message.GetToken() != "" {
		lease := b.lease(message, rejected.GetLease().AsDuration())
		lease.isRejected = true
		lease.End(outcome)
	}
}

// reject tells of a rejected message, and how to settle it. Without a token it is over already.
func reject(rejected *pb.Rejected) (*pb.Delivery, Outcome) {
	message := &pb.Delivery{
		Token:          rejected.GetToken(),
		Number:         rejected.GetNumber(),
		StreamSequence: rejected.GetStreamSequence(),
		DeliveryCount:  rejected.GetDeliveryCount(),
		Headers:        rejected.GetHeaders(),
	}
	log.Printf("message %d rejected: %s", message.GetStreamSequence(), rejected.GetDetail())
	tell("rejected", message)
	if rejected.GetCause() == pb.RejectedCause_REJECTED_CAUSE_TOO_LARGE {
		return message, Nak(time.Minute) // Another worker may accept larger answers.
	}
	return message, Term(rejected.GetDetail())
}

// Wait waits until every lease is settled or lost.
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

// next returns the time of the keeper's next call, or the zero time if every lease is gone.
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

// turn settles and extends all leases that are due, in one call.
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

// giveBack naks all messages that are not begun. A Nak of the last attempt would end the message, so the
// last attempt is left out.
func (b *Batch) giveBack() {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for _, lease := range b.kept {
		if !lease.begun && !lease.isLastAttempt() {
			lease.decide(Outcome{"returned", Nak(0).settlement})
		}
	}
}

// Begin returns whether to work on the message. It returns false if the message is lost or given back.
func (l *Lease) Begin() bool {
	l.batch.mutex.Lock()
	defer l.batch.mutex.Unlock()
	isGivenBack := l.batch.stop.Err() != nil && !l.isLastAttempt()
	l.begun = !l.gone && !l.isOver() && !isGivenBack
	return l.begun
}

// Context is cancelled when the lease is lost.
func (l *Lease) Context() context.Context { return l.ctx }

// End decides the outcome of the message. The keeper settles the message.
func (l *Lease) End(outcome Outcome) {
	l.batch.mutex.Lock()
	defer l.batch.mutex.Unlock()
	l.decide(outcome)
}

// The callers of the following methods hold the mutex.

func (l *Lease) decide(outcome Outcome) {
	if l.gone || l.outcome != nil {
		return
	}
	outcome.settlement.Token = l.GetToken()
	l.event, l.outcome, l.failed, l.next = outcome.event, outcome.settlement, 0, time.Now()
	isHeld := func(lease *Lease) bool { return lease.outcome == nil }
	if slices.ContainsFunc(l.batch.kept, isHeld) {
		l.next = l.next.Add(gather)
	}
	select {
	case l.batch.wake <- struct{}{}:
	default: // The keeper wakes up anyway.
	}
}

// isDue includes leases that are due soon. A lease whose call failed waits for its full time.
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

// settlement returns the outcome, or an Extend if there is no outcome.
func (l *Lease) settlement() *pb.Settlement {
	if l.outcome != nil {
		return l.outcome
	}
	// Without a length, the lease lasts as long as it was granted.
	extend := &pb.Settlement_Extend{Extend: &pb.ExtendAction{}}
	return &pb.Settlement{Token: l.GetToken(), Action: extend}
}

func (l *Lease) lasts(from time.Time, left time.Duration) {
	l.ends, l.failed = from.Add(left), 0
	if l.outcome == nil { // Otherwise the outcome was decided in the meantime.
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

// The meaning of an error for its call.
type trouble struct {
	reason, message string
	passes          bool          // Whether to repeat the call.
	delay           time.Duration // The least wait, if the proxy names a wait.
}

func (t *trouble) Error() string { return t.reason + ": " + t.message }

// With these codes the same call would be refused again.
var refusals = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.PermissionDenied,
	codes.Unauthenticated, codes.Unimplemented,
}

// An error without a reason comes from a transport on the way: only its code counts.
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

// wait returns how long to wait before the call is repeated, and prints it. The wait is partly random,
// because workers that failed together must not come back together.
func (t *trouble) wait(failed int) time.Duration {
	most := min(firstWait<<min(failed, 6), longestWait)
	wait := min(t.delay, longestWait) + most/2 + random.N(most/2)
	Say(Line{Event: "retry", Reason: t.reason, Message: t.message, In: wait.Seconds()})
	return wait
}

// Line is one line of JSON on standard output.
type Line struct {
	Event      string              `json:"event"`
	Sequence   uint64              `json:"sequence,omitempty"`
	Deliveries uint32              `json:"deliveries,omitempty"`
	ID         json.RawMessage     `json:"id,omitempty"`
	Headers    map[string][]string `json:"headers,omitempty"`
	Reason     string              `json:"reason,omitempty"`
	Message    string              `json:"message,omitempty"`
	In         float64             `json:"in,omitempty"`
}

// Say prints a line. It may be called at any time, from any goroutine.
func Say(line Line) { _ = json.NewEncoder(os.Stdout).Encode(line) }

// tell prints the outcome of a message, with the id of its payload, if there is one.
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
