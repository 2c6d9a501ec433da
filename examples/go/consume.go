// The loop with Consume: messages come and outcomes go on one stream, and many handlers run at once. Like
// fetchproxy.go, it must know nothing of the work.
package main

import (
	"context"
	"errors"
	"io"
	"log"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "worker/gen/fetchproxy/v1"
)

const (
	// A stream without a frame for so many heartbeats is dead. So is a worker.
	missedBeats = 3
	// The shortest heartbeat and the shortest lease that the proxy allows.
	shortest = time.Second
)

// Work is the work on one message. Its ctx is cancelled when the lease is lost.
type Work func(ctx context.Context, message *pb.Delivery) Outcome

// Consume works on as many messages at once as start has credit for. It returns when stop has ended and
// every message is settled, or when the proxy refuses the call. If the worker dies, others get its
// messages after grace.
func Consume(
	stop context.Context, client pb.FetchServiceClient, start *pb.ConsumeStart,
	grace time.Duration, work Work,
) error {
	grace = max(grace, shortest)
	beat := max(grace/missedBeats, shortest)
	start.Heartbeat = durationpb.New(beat)
	start.Holding = &pb.ConsumeStart_Keep{Keep: &pb.ConsumeKeep{Grace: durationpb.New(grace)}}
	c := &consumer{
		stop: stop, client: client, start: start, grace: grace, beat: beat, work: work,
		held: map[*held]bool{},
	}
	c.current = c.newStream()
	for failed := 0; ; {
		s := c.current
		c.streams.Go(s.run)
		select {
		case <-s.draining: // The next stream takes over, and this one ends by itself.
			continue
		case <-s.ended:
		}
		if stop.Err() != nil && c.isEmpty() {
			return nil
		}
		if s.opened {
			failed = 0
		}
		switch trouble := troubleOf(s.err); {
		case trouble == nil:
		case s.opened && trouble.reason == "UNAUTHENTICATED": // The file may have a newer credential.
		case trouble.passes:
			c.sleep(trouble.wait(failed))
			failed++
		default:
			c.loseAll(trouble)
			return trouble
		}
	}
}

// consumer has the messages in hand, and the streams that carry them.
type consumer struct {
	stop    context.Context
	client  pb.FetchServiceClient
	start   *pb.ConsumeStart
	grace   time.Duration
	beat    time.Duration
	work    Work
	streams sync.WaitGroup

	mutex   sync.Mutex // Guards the rest, and what changes of a stream or of a message.
	current *stream    // The stream that is open, or will be next.
	held    map[*held]bool
}

// held is a message in hand.
type held struct {
	*pb.Delivery

	stream     *stream // Carries the settlement.
	number     uint64  // The name of the message on this stream. 0: it came by an earlier stream.
	cancel     context.CancelFunc
	outcome    Outcome // Empty until the work is done.
	isGone     bool    // It is settled or lost.
	isRejected bool    // The event was printed already.
}

// stream is one call of Consume. One goroutine reads, another writes.
type stream struct {
	*consumer

	wake     chan struct{}      // There is something to write.
	draining chan struct{}      // Closed when another stream is to be opened.
	ended    chan struct{}      // Closed when the call has ended, with err.
	err      error              // Nil: an orderly end.
	ready    map[*held]bool     // To be settled or extended in the next frame.
	sent     map[uint64][]*held // Without a result yet, by the id of the frame.
	lastID   uint64
	failed   int  // The number of frames in a row that must be repeated.
	opened   bool // The proxy serves it.
	pausing  bool // The credit was set to 0.
	paused   bool // No message comes any more.
}

func (c *consumer) newStream() *stream {
	return &stream{
		consumer: c,
		wake:     make(chan struct{}, 1),
		draining: make(chan struct{}),
		ended:    make(chan struct{}),
		ready:    map[*held]bool{},
		sent:     map[uint64][]*held{},
	}
}

// isEmpty waits for the streams that are draining.
func (c *consumer) isEmpty() bool {
	c.streams.Wait()
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return len(c.held) == 0
}

// sleep ends early when there is nothing more to wait for.
func (c *consumer) sleep(wait time.Duration) {
	if c.stop.Err() != nil {
		time.Sleep(wait)
	} else {
		sleep(c.stop, wait)
	}
}

func (c *consumer) loseAll(why *trouble) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for message := range c.held {
		message.lose(why)
	}
}

func (s *stream) run() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer context.AfterFunc(s.stop, func() {
		s.mutex.Lock()
		defer s.mutex.Unlock()
		if !s.opened && len(s.held) == 0 {
			cancel()
		}
		s.wakeUp()
	})()
	s.err = s.read(ctx, cancel)
	s.end()
	close(s.ended)
}

// read takes what comes until the end of the call.
func (s *stream) read(ctx context.Context, cancel context.CancelFunc) error {
	dead := time.AfterFunc(missedBeats*s.beat, func() {
		log.Printf("no frame for %v: the stream is given up", missedBeats*s.beat)
		cancel()
	})
	defer dead.Stop()
	wire, err := s.client.Consume(ctx)
	if err != nil {
		return err
	}
	go s.write(wire)
	for {
		frame, err := wire.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		dead.Reset(missedBeats * s.beat)
		s.take(frame)
	}
}

// write sends a frame when there is something to say, and with each heartbeat. An error of Send is nothing
// new: Recv has the reason.
func (s *stream) write(wire grpc.BidiStreamingClient[pb.ConsumeRequest, pb.ConsumeResponse]) {
	first := s.frame()
	first.Start = s.start
	beat := time.NewTicker(s.beat)
	defer beat.Stop()
	for err := wire.Send(first); err == nil && !s.isDone(); err = wire.Send(s.frame()) {
		select {
		case <-wire.Context().Done():
			return
		case <-s.wake:
		case <-beat.C:
			s.extend()
		}
	}
	_ = wire.CloseSend()
}

// frame has all that is there to say: as many settlements as fit, or nothing, as a sign of life.
func (s *stream) frame() *pb.ConsumeRequest {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	frame := &pb.ConsumeRequest{}
	if s.stop.Err() != nil && !s.pausing {
		s.pausing = true
		frame.Credit = &pb.ConsumeCredit{Id: 1, MaxLeases: new(uint32)}
	}
	var settlements []*pb.Settlement
	s.lastID++
	for message := range s.ready {
		if len(settlements) == mostSettlements {
			s.wakeUp() // The rest is for the next frame.
			break
		}
		settlements = append(settlements, message.settlement())
		s.sent[s.lastID] = append(s.sent[s.lastID], message)
		delete(s.ready, message)
	}
	if settlements != nil {
		frame.Settle = &pb.ConsumeSettle{Id: s.lastID, Settlements: settlements}
	}
	return frame
}

// isDone returns whether the worker stops, and this stream has nothing more to settle.
func (s *stream) isDone() bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for message := range s.held {
		if message.stream == s {
			return false
		}
	}
	return s.pausing && s.paused
}

// extend renews the leases that have outlived their stream. The proxy keeps the others.
func (s *stream) extend() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for message := range s.held {
		if message.stream == s && message.number == 0 && message.outcome.settlement == nil {
			s.ready[message] = true
		}
	}
}

func (s *stream) take(frame *pb.ConsumeResponse) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.opened = true
	for _, message := range frame.GetMessages() {
		s.begin(message)
	}
	for _, rejected := range frame.GetRejected() {
		message, outcome := reject(rejected)
		if message.GetToken() != "" {
			s.hold(message, func() {}, true).decide(outcome)
		}
	}
	for _, result := range frame.GetResults() {
		s.settled(result)
	}
	for _, ended := range frame.GetEnded() {
		s.lost(ended)
	}
	if frame.GetDraining() != nil {
		s.current = s.newStream()
		close(s.draining)
	}
	if frame.GetCreditId() != 0 {
		s.paused = true
		s.wakeUp()
	}
}

// begin runs the work. There is room for it, because the credit counts all messages that are not settled.
func (s *stream) begin(message *pb.Delivery) {
	ctx, cancel := context.WithCancel(context.Background())
	held := s.hold(message, cancel, false)
	go func() {
		outcome := s.work(ctx, message)
		s.mutex.Lock()
		defer s.mutex.Unlock()
		held.decide(outcome)
	}()
}

func (s *stream) hold(message *pb.Delivery, cancel context.CancelFunc, isRejected bool) *held {
	held := &held{
		Delivery: message, stream: s, number: message.GetNumber(), cancel: cancel, isRejected: isRejected,
	}
	s.held[held] = true
	return held
}

// settled has the results of one frame.
func (s *stream) settled(result *pb.ConsumeResult) {
	var again []*held
	var reason *trouble
	for i, message := range s.sent[result.GetId()] {
		trouble := troubleIn(result.GetError())
		if trouble == nil {
			trouble = troubleIn(result.GetResults()[i].GetError())
		}
		switch {
		case trouble == nil && result.GetResults()[i].GetOutcome() == pb.Outcome_OUTCOME_EXTENDED:
		case trouble == nil:
			message.goes(message.outcome.event)
		case trouble.passes:
			again, reason = append(again, message), trouble
		default:
			message.lose(trouble)
		}
	}
	delete(s.sent, result.GetId())
	if again == nil {
		s.failed = 0
		return
	}
	time.AfterFunc(reason.wait(s.failed), func() {
		s.mutex.Lock()
		defer s.mutex.Unlock()
		for _, message := range again {
			message.send()
		}
	})
	s.failed++
}

// lost stops the work on a message whose lease has ended.
func (s *stream) lost(ended *pb.ConsumeEnded) {
	for message := range s.held {
		if message.stream == s && message.number == ended.GetNumber() {
			message.lose(troubleIn(ended.GetWhy()))
		}
	}
}

// end hands what is left to the next stream: it is settled there by token, or extended.
func (s *stream) end() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.current == s {
		s.current = s.newStream()
	}
	for message := range s.held {
		if message.stream == s {
			message.stream, message.number = s.current, 0
			message.send()
		}
	}
}

func (s *stream) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default: // The writer wakes up anyway.
	}
}

// The callers of the following methods hold the mutex.

func (h *held) decide(outcome Outcome) {
	h.outcome = outcome
	h.send()
}

// send puts the message into the next frame.
func (h *held) send() {
	if !h.isGone {
		h.stream.ready[h] = true
		h.stream.wakeUp()
	}
}

// settlement returns the outcome, or an Extend if there is no outcome.
func (h *held) settlement() *pb.Settlement {
	settlement := &pb.Settlement{Action: h.outcome.settlement.GetAction(), Number: h.number}
	if h.outcome.settlement == nil {
		extend := &pb.ExtendAction{Lease: durationpb.New(h.stream.grace)}
		settlement.Action = &pb.Settlement_Extend{Extend: extend}
	}
	if h.number == 0 {
		settlement.Token = h.GetToken()
	}
	return settlement
}

func (h *held) lose(why *trouble) {
	log.Printf("message %d lost: %v", h.GetStreamSequence(), why)
	h.goes("lost")
}

func (h *held) goes(event string) {
	if h.isGone {
		return
	}
	h.isGone = true
	h.cancel()
	delete(h.stream.held, h)
	delete(h.stream.ready, h)
	h.stream.wakeUp()
	if !h.isRejected {
		tell(event, h.Delivery)
	}
}
