package fetchproxy

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// The most bytes of the settlements of a frame, about. The proxy accepts 512 KiB.
const mostFrame = 384 << 10

// stream is one call of Consume. One goroutine reads, another writes.
type stream struct {
	*consumer

	wake     chan struct{} // There is something to write.
	draining chan struct{} // Closed when another stream is to be opened.
	ended    chan struct{} // Closed when the call has ended, with err.
	err      error         // Nil: an orderly end.

	// Guarded by the mutex of hand.
	ready  map[*lease]bool     // To be settled or extended in the next frame.
	sent   map[uint64][]*lease // Without a result yet, by the id of the frame.
	lastID uint64
	failed int       // The number of frames in a row that must be repeated.
	opened bool      // The proxy serves it.
	heard  time.Time // When the last frame came.
	credit uint32    // The last credit that was sent, and its id.
	id     uint64
	pause  uint64 // The id of the last credit, which is 0. 0: it is not sent yet.
	paused bool   // No message comes any more.
}

func newStream(c *consumer) *stream {
	return &stream{
		consumer: c,
		wake:     make(chan struct{}, 1),
		draining: make(chan struct{}),
		ended:    make(chan struct{}),
		ready:    map[*lease]bool{},
		sent:     map[uint64][]*lease{},
		heard:    time.Now(),
	}
}

func (s *stream) run() {
	ctx, cancel := context.WithCancel(s.ctx)
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
	s.mutex.Lock()
	s.move(s)
	s.unlock()
	close(s.ended)
}

// read takes what comes until the end of the call.
func (s *stream) read(ctx context.Context, cancel context.CancelFunc) error {
	silence := missedBeats * s.beat
	var isSilent atomic.Bool
	dead := time.AfterFunc(silence, func() {
		isSilent.Store(true)
		cancel()
	})
	defer dead.Stop()
	wire, err := s.client.service.Consume(ctx)
	if err != nil {
		return err
	}
	go s.write(wire)
	for {
		frame, err := wire.Recv()
		if isSilent.Load() {
			return status.Errorf(codes.DeadlineExceeded, "no frame for %v: the stream is given up", silence)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		dead.Reset(silence)
		s.take(frame)
	}
}

// write sends a frame when there is something to say, and with each heartbeat. An error of Send is nothing new:
// Recv has the reason.
func (s *stream) write(wire grpc.BidiStreamingClient[pb.ConsumeRequest, pb.ConsumeResponse]) {
	beat := time.NewTicker(s.beat)
	defer beat.Stop()
	frame := s.frame()
	frame.Start = s.start
	if wire.Send(frame) != nil {
		return
	}
	for !s.isDone() {
		isBeat := false
		select {
		case <-wire.Context().Done():
			return
		case <-s.wake:
		case <-beat.C:
			isBeat = true
			s.extend()
		}
		frame := s.frame()
		if !isBeat && frame.Credit == nil && frame.Settle == nil {
			continue
		}
		if wire.Send(frame) != nil {
			return
		}
	}
	_ = wire.CloseSend()
}

// frame has all that is there to say: as many settlements as fit, or nothing, as a sign of life.
func (s *stream) frame() *pb.ConsumeRequest {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	frame := &pb.ConsumeRequest{}
	if room := s.room(s); room != s.credit || (s.isStopping() && s.pause == 0) {
		s.credit = room
		s.id++
		if s.isStopping() {
			s.pause = s.id
		}
		frame.Credit = &pb.ConsumeCredit{Id: s.id, MaxLeases: &room}
	}
	var settlements []*Settlement
	size := 0
	s.lastID++
	for l := range s.ready {
		if len(settlements) == MaxSettlements || size > mostFrame {
			s.wakeUp() // The rest is for the next frame.
			break
		}
		settlement := s.settlement(l)
		size += len(settlement.GetToken()) + len(settlement.GetTerm().GetReason()) + 32
		settlements = append(settlements, settlement)
		s.sent[s.lastID] = append(s.sent[s.lastID], l)
		delete(s.ready, l)
	}
	if settlements != nil {
		frame.Settle = &pb.ConsumeSettle{Id: s.lastID, Settlements: settlements}
	}
	return frame
}

// settlement returns the outcome, or an Extend if there is no outcome. The lease lasts for some heartbeats, because
// each of them extends it again.
func (s *stream) settlement(l *lease) *Settlement {
	settlement := &Settlement{Action: l.outcome.GetAction(), Number: l.number}
	if l.outcome == nil {
		settlement.Action = SettleExtend("", missedBeats*s.beat).GetAction()
	}
	if l.number == 0 {
		settlement.Token = l.Token
	}
	return settlement
}

// isDone returns whether the worker stops, and this stream has nothing more to settle.
func (s *stream) isDone() bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if !s.paused {
		return false
	}
	for l := range s.held {
		if l.stream == s {
			return false
		}
	}
	return true
}

// extend renews the leases that have outlived their stream, each for AtMost. The proxy keeps the others.
func (s *stream) extend() {
	s.mutex.Lock()
	defer s.unlock()
	for l := range s.held {
		switch {
		case l.stream != s || l.number != 0 || l.outcome != nil:
		case time.Since(l.taken) > s.worker.options.AtMost:
			s.lose(l, expired("the handler has taken longer than AtMost"))
		default:
			s.ready[l] = true
		}
	}
}

func (s *stream) take(frame *pb.ConsumeResponse) {
	s.mutex.Lock()
	defer s.unlock()
	s.opened, s.heard = true, time.Now()
	for _, message := range frame.GetMessages() {
		s.consumer.take(s, message)
	}
	for _, rejected := range frame.GetRejected() {
		s.takeRejected(s, rejected)
	}
	for _, result := range frame.GetResults() {
		s.settledAll(result)
	}
	for _, ended := range frame.GetEnded() {
		s.lost(ended)
	}
	if frame.GetDraining() != nil && s.current == s {
		s.current = newStream(s.consumer)
		close(s.draining)
	}
	if s.pause != 0 && frame.GetCreditId() >= s.pause {
		s.paused = true
		s.wakeUp()
	}
}

// settledAll has the results of one frame. The mutex is held, as in all methods that follow.
func (s *stream) settledAll(result *pb.ConsumeResult) {
	var again []*lease
	var reason *Error
	for i, l := range s.sent[result.GetId()] {
		one, failure := SettleResult{}, settleError(result.GetError())
		if failure == nil {
			one = resultAt(result.GetResults(), i)
			failure = one.Err
		}
		switch {
		case failure == nil && one.Outcome == pb.Outcome_OUTCOME_EXTENDED:
			s.extended(l, one.Lease)
		case failure == nil:
			s.settled(l)
		case failure.repeatable:
			again, reason = append(again, l), failure
		default:
			s.lose(l, failure)
		}
	}
	delete(s.sent, result.GetId())
	s.wakeUp()
	if again == nil {
		s.failed = 0
		return
	}
	wait := reason.wait(s.failed)
	s.failed++
	s.events = append(s.events, s.eventOfRetry(reason, wait))
	time.AfterFunc(wait, func() {
		s.mutex.Lock()
		defer s.mutex.Unlock()
		for _, l := range again {
			s.send(l)
		}
	})
}

// lost stops the work on a message whose lease has ended.
func (s *stream) lost(ended *pb.ConsumeEnded) {
	for l := range s.held {
		if l.stream == s && l.number == ended.GetNumber() {
			s.lose(l, settleError(ended.GetWhy()))
		}
	}
	s.wakeUp()
}

func (s *stream) wakeUp() { signalTo(s.wake) }
