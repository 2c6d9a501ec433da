package fetchproxy

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// A stream without a frame for so many heartbeats is dead. So is a worker.
const missedBeats = 3

// consumer is the loop with Consume: one stream carries messages and outcomes. The streams follow each other.
type consumer struct {
	*hand

	client  *Client
	start   *pb.ConsumeStart
	grace   time.Duration
	beat    time.Duration
	ctx     context.Context // Of the streams.
	streams sync.WaitGroup

	current *stream // The stream that is open, or will be next. Guarded by the mutex of hand.
}

// runConsume returns when the worker has stopped and no message is in hand, or when the proxy refuses the call.
func runConsume(h *hand, worker *Worker) error {
	options := worker.options
	beat := max(options.Grace/missedBeats, MinLease)
	ctx, cancel := context.WithCancel(h.giveUp)
	c := &consumer{
		hand:   h,
		client: worker.client,
		grace:  options.Grace,
		beat:   beat,
		ctx:    ctx,
		start: &pb.ConsumeStart{
			Stream:   worker.stream,
			Consumer: worker.consumer,
			Holding: &pb.ConsumeStart_Keep{Keep: &pb.ConsumeKeep{
				Grace: durationpb.New(options.Grace), AtMost: durationpb.New(options.AtMost),
			}},
			// The first frame also has the real credit.
			Credit:        &pb.ConsumeCredit{MaxLeases: new(uint32), MaxBytes: new(uint64(options.MaxBytes))},
			Codec:         worker.handler.codec,
			MaxFrameBytes: uint32(min(options.MaxBytes, mostBytes)),
			Heartbeat:     durationpb.New(beat),
			Worker:        options.Name,
		},
	}
	h.decided = c.send
	h.returned = func() {
		if c.room(c.current) != c.current.credit {
			c.current.wakeUp()
		}
	}
	c.current = newStream(c)
	defer h.watch()()
	defer func() {
		cancel()
		c.streams.Wait()
	}()
	return c.run()
}

func (c *consumer) run() error {
	for failed := 0; ; {
		s := c.current
		c.streams.Go(s.run)
		select {
		case <-s.draining: // The next stream takes over, and this one ends by itself.
			continue
		case <-s.ended:
		}
		if c.isStopping() {
			c.streams.Wait()
			c.expire()
			if c.isEmpty() {
				return nil
			}
		}
		if s.opened {
			failed = 0
		}
		failure := callError(c.ctx, s.err)
		switch {
		case failure == nil:
		case s.opened && failure.Reason == reasonUnauthenticated: // The file may have a newer credential.
		case failure.repeatable:
			ctx := c.stop
			if c.isStopping() {
				ctx = c.giveUp
			}
			sleep(ctx, c.retry(failure, failed))
			failed++
		default:
			c.worker.endStop()
			c.loseAll(failure)
			return failure
		}
	}
}

// expire loses the messages whose leases are over by the clock of this process. A message with an outcome is
// tried again while the worker runs, because its settlement may have arrived.
func (c *consumer) expire() {
	c.mutex.Lock()
	defer c.unlock()
	for l := range c.held {
		if !l.ends.IsZero() && time.Until(l.ends) <= 0 && (l.outcome == nil || c.isStopping()) {
			c.lose(l, expired("no stream has reached the proxy for the grace of the lease"))
		}
	}
}

// The callers of the following methods hold the mutex.

// send puts the message into the next frame of its stream.
func (c *consumer) send(l *lease) {
	if !l.gone {
		l.stream.ready[l] = true
		l.stream.wakeUp()
	}
}

// move hands the messages of a stream that has ended to the next stream: they are settled there by token, or
// extended. Until then they last for the grace.
func (c *consumer) move(from *stream) {
	if c.current == from {
		c.current = newStream(c)
	}
	for l := range c.held {
		if l.stream == from {
			if l.number != 0 {
				l.ends = from.heard.Add(c.grace)
			}
			l.stream, l.number = c.current, 0
			c.send(l)
		}
	}
	time.AfterFunc(time.Until(from.heard.Add(c.grace)), c.expire)
}

// extended renews a lease that has outlived its stream.
func (c *consumer) extended(l *lease, left time.Duration) {
	if l.gone {
		return
	}
	l.ends = time.Now().Add(left)
	time.AfterFunc(left, c.expire)
}

// room returns how many messages a stream may hold. Handlers at work on messages of other streams, or on
// messages that are lost, leave less room.
func (c *consumer) room(s *stream) uint32 {
	if c.isStopping() {
		return 0
	}
	own := 0
	for l := range c.held {
		if l.stream == s && l.number != 0 && l.begun && l.outcome == nil {
			own++
		}
	}
	others := c.running - own
	for _, l := range c.waiting {
		if l.stream != s || l.number == 0 {
			others++
		}
	}
	return uint32(max(c.worker.options.Concurrency-others, 0))
}

func (c *consumer) take(s *stream, delivery *pb.Delivery) {
	l := c.hold(newMessage(c.start.Stream, c.start.Consumer, delivery), proto.Size(delivery))
	l.stream, l.number = s, delivery.GetNumber()
	c.handle(l)
}

func (c *consumer) takeRejected(s *stream, delivery *pb.Rejected) {
	rejected := newRejected(c.start.Stream, c.start.Consumer, delivery)
	if l := c.reject(rejected); l != nil {
		l.stream, l.number = s, delivery.GetNumber()
		c.settleRejected(l, rejected)
	}
}
