package fetchproxy

import (
	"context"
	"crypto/rand"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "fetchproxy/gen/fetchproxy/v1"
)

const (
	// After an empty answer that came sooner, the worker waits for the rest of this time.
	tooSoon = 500 * time.Millisecond
	// How long an outcome may wait for others, to be settled in the same call.
	gather = 10 * time.Millisecond
	// Leases are not extended more often.
	shortestBeat = 50 * time.Millisecond
	// The shortest deadline of a Settle.
	shortestSettle = time.Second
)

// fetcher is the loop with Fetch. It fetches when no message waits and a handler is free. Only its keeper calls
// Settle. The keeper extends the leases and settles the outcomes while the next Fetch waits, so no outcome waits
// for the work on another message.
type fetcher struct {
	*hand

	client *Client
	wake   chan struct{} // For the keeper: something was decided.
	free   chan struct{} // For the loop: there may be room for messages.
	ended  bool          // No more messages are taken. Guarded by the mutex of hand.
}

// runFetch returns when the worker has stopped and no message is in hand, or when the proxy refuses the call.
func runFetch(h *hand, worker *Worker) error {
	f := &fetcher{
		hand: h, client: worker.client, wake: make(chan struct{}, 1), free: make(chan struct{}, 1),
	}
	h.decided = f.settle
	h.returned = func() { signalTo(f.free) }
	defer h.watch()()
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		f.keep()
	}()
	err := f.run()
	worker.endStop()
	f.mutex.Lock()
	f.ended = true
	f.mutex.Unlock()
	signalTo(f.wake)
	<-kept
	return err
}

// run fetches until the worker stops, or until the proxy refuses the call.
func (f *fetcher) run() error {
	for {
		n := f.room()
		if n == 0 {
			return nil
		}
		answer, err := f.fetch(n)
		if err != nil {
			return err
		}
		f.take(answer)
	}
}

// room waits until there is room for messages, and returns for how many. 0: the worker stops.
func (f *fetcher) room() int {
	for !f.isStopping() {
		options := f.worker.options
		f.mutex.Lock()
		room := options.Batch - f.running
		hasRoom := len(f.waiting) == 0 && f.running < options.Concurrency && f.bytes < options.MaxBytes
		f.mutex.Unlock()
		if hasRoom && room > 0 {
			return room
		}
		select {
		case <-f.free:
		case <-f.stop.Done():
		}
	}
	return 0
}

// fetch repeats the call until it is answered or refused. The repeats have one name, so they get the messages of
// an answer that was lost. The answer is nil if the worker stops.
func (f *fetcher) fetch(n int) (*pb.FetchResponse, error) {
	options := f.worker.options
	request := &pb.FetchRequest{
		Stream:    f.worker.stream,
		Consumer:  f.worker.consumer,
		N:         uint32(n),
		MaxWait:   durationpb.New(options.MaxWait),
		MaxBytes:  uint32(min(options.MaxBytes, mostBytes)),
		Codec:     f.worker.handler.codec,
		AttemptId: rand.Text(),
		Worker:    options.Name,
	}
	if options.Lease != 0 {
		request.Lease = durationpb.New(options.Lease)
	}
	for failed := 0; !f.isStopping(); failed++ {
		request.AttemptAgain = failed > 0
		began := time.Now()
		ctx, cancel := context.WithTimeout(f.stop, fetchDeadline(request))
		answer, err := f.client.service.Fetch(ctx, request)
		cancel()
		switch failure := callError(f.stop, err); {
		case failure == nil:
			if len(answer.GetMessages())+len(answer.GetRejected()) == 0 {
				sleep(f.stop, tooSoon-time.Since(began))
			}
			return answer, nil
		case f.isStopping(): // The call was cancelled.
		case failure.repeatable:
			sleep(f.stop, f.retry(failure, failed))
		default:
			return nil, failure
		}
	}
	f.client.forget(request)
	return nil, nil
}

func (f *fetcher) take(answer *pb.FetchResponse) {
	now := time.Now()
	f.mutex.Lock()
	defer f.unlock()
	for _, delivery := range answer.GetMessages() {
		message := newMessage(f.worker.stream, f.worker.consumer, delivery)
		l := f.hold(message, proto.Size(delivery))
		f.lasts(l, now, message.Lease)
		if !f.isStopping() || !f.giveBack(l) {
			f.handle(l)
		}
	}
	for _, delivery := range answer.GetRejected() {
		rejected := newRejected(f.worker.stream, f.worker.consumer, delivery)
		if l := f.reject(rejected); l != nil {
			f.lasts(l, now, rejected.Lease)
			f.settleRejected(l, rejected)
		}
	}
	signalTo(f.wake)
}

// keep extends and settles until no message is in hand, and none can come.
func (f *fetcher) keep() {
	for {
		next, isOver := f.next()
		if isOver {
			return
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-f.wake:
		case <-timer.C:
			f.turn()
			signalTo(f.free)
		case <-f.giveUp.Done():
			f.loseAll(cancelled("the worker has stopped"))
		}
		timer.Stop()
	}
}

// next returns the time of the keeper's next call, and whether the keeper is done.
func (f *fetcher) next() (next time.Time, isOver bool) {
	f.mutex.Lock()
	defer f.unlock()
	next = time.Now().Add(longestWait)
	for l := range f.held {
		if time.Until(l.ends) <= 0 {
			f.lose(l, expired("by the clock of this process, it is over"))
			continue
		}
		for _, at := range []time.Time{l.next, l.ends} {
			if at.Before(next) {
				next = at
			}
		}
	}
	return next, f.ended && len(f.held) == 0
}

// turn settles and extends all leases that are due, in one call.
func (f *fetcher) turn() {
	taken, settlements, timeout := f.due()
	if len(taken) == 0 {
		return
	}
	sent := time.Now()
	ctx, cancel := context.WithTimeout(f.giveUp, timeout)
	defer cancel()
	answer, err := f.client.service.Settle(ctx, &pb.SettleRequest{Settlements: settlements})
	callFailure := callError(ctx, err)

	f.mutex.Lock()
	defer f.unlock()
	var again []*lease
	var reason *Error
	failed := 0
	for i, l := range taken {
		result, failure := SettleResult{}, callFailure
		if failure == nil {
			result = resultAt(answer.GetResults(), i)
			failure = result.Err
		}
		switch {
		case failure == nil && l.outcome == settlements[i]:
			f.settled(l)
		case failure == nil:
			f.lasts(l, sent, result.Lease)
		case failure.repeatable:
			again, reason, failed = append(again, l), failure, max(failed, l.failed)
		default:
			f.lose(l, failure)
		}
	}
	if again == nil {
		return
	}
	wait := reason.wait(failed)
	f.events = append(f.events, f.eventOfRetry(reason, wait))
	for _, l := range again {
		l.failed, l.next = failed+1, time.Now().Add(wait)
	}
}

// due returns the leases whose time has come, with a deadline for their call. A lease that is due soon is
// included, unless its last call failed.
func (f *fetcher) due() (taken []*lease, settlements []*Settlement, timeout time.Duration) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	timeout = settleDeadline
	for l := range f.held {
		early := gather
		if l.failed > 0 {
			early = 0
		}
		if time.Until(l.next) > early || len(taken) == MaxSettlements {
			continue
		}
		settlement := l.outcome
		if settlement == nil {
			// Without a length, the lease lasts as long as it was granted.
			settlement = SettleExtend("", 0)
		}
		settlement.Token = l.Token
		taken, settlements = append(taken, l), append(settlements, settlement)
		timeout = min(timeout, time.Until(l.ends)/2)
	}
	return taken, settlements, max(timeout, shortestSettle)
}

// The callers of the following methods hold the mutex.

// settle lets the keeper settle an outcome soon, together with others.
func (f *fetcher) settle(l *lease) {
	l.failed, l.next = 0, time.Now()
	for other := range f.held {
		if other.outcome == nil {
			l.next = l.next.Add(gather)
			break
		}
	}
	signalTo(f.wake)
}

func (f *fetcher) lasts(l *lease, from time.Time, left time.Duration) {
	l.ends, l.failed = from.Add(left), 0
	if last := l.taken.Add(f.worker.options.AtMost); last.Before(l.ends) {
		l.ends = last
	}
	if l.outcome == nil { // Otherwise the outcome was decided in the meantime.
		l.next = time.Now().Add(max(time.Until(l.ends)/3, shortestBeat))
	}
}
