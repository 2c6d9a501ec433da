package fetchproxy_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"fetchproxy"
	"fetchproxy/fetchproxytest"
)

func TestStopFinishesTheHandlersThatRun(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		running, waiting := proxy.Publish(task{}), proxy.Publish(task{})
		begun, finish := make(chan struct{}), make(chan struct{})
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, Concurrency: 1, Batch: 2},
			func(ctx context.Context, _ task, _ *fetchproxy.Message) error {
				close(begun)
				<-finish
				return ctx.Err()
			})
		wait := begin(t, worker)
		<-begun
		worker.Stop()
		if mode == fetchproxy.ModeFetch {
			until(t, "the message that waits goes back", func() bool { return events.has(fetchproxy.EventReturned) })
			settlements(t, waiting, giveBack)
			events.check(2, "returned")
		}
		close(finish)
		if err := wait(); err != nil {
			t.Fatal(err)
		}
		settlements(t, running, ack)
		events.check(1, "acked")
		if waiting.HasEnded() {
			t.Error("the second message is not for this worker")
		}
		events.check(0, "ready", "stopped")
	})
}

// The proxy counts a place for such a message, so giving it back would cost it an attempt for nothing.
func TestMessageThatCrossesAStopIsHandled(t *testing.T) {
	for range 20 {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		first := proxy.Publish(task{N: 1})
		var crossing *fetchproxytest.Record
		var worker *fetchproxy.Worker
		worker, _ = newWorker(t, proxy, fetchproxy.WorkerOptions{Concurrency: 2},
			func(_ context.Context, data task, _ *fetchproxy.Message) error {
				if data.N == 1 {
					crossing = proxy.Publish(task{N: 2})
					worker.Stop()
				}
				return nil
			})
		if err := begin(t, worker)(); err != nil {
			t.Fatal(err)
		}
		settlements(t, first, ack)
		if crossing.Attempts() > 0 {
			settlements(t, crossing, ack)
		}
	}
}

func TestEndOfTheContextIsAStop(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		record := proxy.Publish(task{})
		ctx, cancel := context.WithCancel(context.WithValue(context.Background(), task{}, "value"))
		worker, _ := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(ctx context.Context, _ task, _ *fetchproxy.Message) error {
				if ctx.Value(task{}) != "value" {
					t.Error("the values of the context are missing")
				}
				cancel()
				time.Sleep(10 * time.Millisecond)
				return ctx.Err()
			})
		if err := worker.Run(ctx); err != nil {
			t.Fatal(err)
		}
		settlements(t, record, ack)
		if err := worker.Run(context.Background()); err == nil {
			t.Error("a worker runs once")
		}
	})
}

func TestSecondStopCancelsTheHandlersAndGivesTheirMessagesBack(t *testing.T) {
	stops := map[string]func(*fetchproxy.Worker){
		"by a second Stop":   func(worker *fetchproxy.Worker) { worker.Stop(); worker.Stop() },
		"by the StopTimeout": func(worker *fetchproxy.Worker) { worker.Stop() },
	}
	for name, stop := range stops {
		t.Run(name, func(t *testing.T) {
			inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
				proxy := fetchproxytest.New(t, fetchproxytest.Options{MaxDeliver: 2})
				first, last := proxy.Publish(task{N: 1}), proxy.Publish(task{N: 2})
				begun := make(chan struct{}, 2)
				worker, events := newWorker(t, proxy,
					// No Fetch waits meanwhile, which could take a message again.
					fetchproxy.WorkerOptions{Mode: mode, Concurrency: 2, StopTimeout: 50 * time.Millisecond},
					func(ctx context.Context, data task, message *fetchproxy.Message) error {
						if data.N == 2 && !message.LastAttempt() {
							return fetchproxy.Nak(0)
						}
						begun <- struct{}{}
						<-ctx.Done()
						return nil // The outcome must be dropped.
					})
				wait := begin(t, worker)
				<-begun
				<-begun
				until(t, "the first attempt is over", func() bool { return events.has(fetchproxy.EventNacked) })
				stop(worker)
				if err := wait(); err != nil {
					t.Fatal(err)
				}
				settlements(t, first, giveBack)
				settlements(t, last, giveBack) // Of its first attempt. A Nak of the last would end it.
				events.check(1, "returned")
				events.check(2, "nacked", "lost")
			})
		})
	}
}

func TestLastAttemptThatWaitsIsHandledAtAStop(t *testing.T) {
	proxy := fetchproxytest.New(t, fetchproxytest.Options{MaxDeliver: 1})
	running, waiting := proxy.Publish(task{}), proxy.Publish(task{})
	begun, finish := make(chan struct{}, 2), make(chan struct{})
	worker, _ := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: fetchproxy.ModeFetch, Concurrency: 1, Batch: 2},
		func(context.Context, task, *fetchproxy.Message) error { begun <- struct{}{}; <-finish; return nil })
	wait := begin(t, worker)
	<-begun
	worker.Stop()
	close(finish)
	if err := wait(); err != nil {
		t.Fatal(err)
	}
	settlements(t, running, ack)
	settlements(t, waiting, ack)
}

func TestHandlerThatIgnoresItsContextDoesNotHoldUpASecondStop(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		record := proxy.Publish(task{})
		begun, hang := make(chan struct{}), make(chan struct{})
		defer close(hang)
		worker, _ := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, Concurrency: 1},
			func(context.Context, task, *fetchproxy.Message) error { close(begun); <-hang; return nil })
		wait := begin(t, worker)
		<-begun
		worker.Stop()
		worker.Stop()
		if err := wait(); err != nil {
			t.Fatal(err)
		}
		settlements(t, record, giveBack)
	})
}

func TestHandlerIsCancelledWhenItsLeaseIsLost(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{AckWait: time.Second})
		record := proxy.Publish(task{})
		cause := make(chan error, 1)
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, Concurrency: 1},
			func(ctx context.Context, _ task, message *fetchproxy.Message) error {
				if message.DeliveryCount > 1 {
					return nil
				}
				proxy.Expire(record)
				<-ctx.Done()
				cause <- context.Cause(ctx)
				return fetchproxy.Term("this outcome is dropped")
			})
		proxy.Run(worker)
		settlements(t, record, ack)
		events.check(1, "lost", "acked")
		var failed *fetchproxy.Error
		if err := <-cause; !errors.As(err, &failed) || failed.Reason != "LEASE_EXPIRED" {
			t.Errorf("the cause is %v", err)
		}
	})
}

func TestHandlerThatHangsKeepsItsMessageForAtMost(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{AckWait: 600 * time.Millisecond})
		record := proxy.Publish(task{})
		hang := make(chan struct{})
		var calls atomic.Int32
		options := fetchproxy.WorkerOptions{Mode: mode, Concurrency: 1, AtMost: time.Second, Grace: time.Second}
		worker, events := newWorker(t, proxy, options,
			func(context.Context, task, *fetchproxy.Message) error { calls.Add(1); <-hang; return nil })
		wait := begin(t, worker)
		began := time.Now()
		until(t, "the message is lost", func() bool { return events.has(fetchproxy.EventLost) })
		if kept := time.Since(began); kept < 900*time.Millisecond {
			t.Errorf("the message was kept for %v alone", kept)
		}
		// The handler keeps its place, so this worker does not begin a second handler.
		other, _ := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(context.Context, task, *fetchproxy.Message) error { return nil })
		proxy.Run(other)
		settlements(t, record, ack)
		if calls.Load() != 1 {
			t.Errorf("%d handlers at once instead of 1", calls.Load())
		}
		close(hang)
		later := proxy.Publish(task{})
		until(t, "a handler that has returned makes room", later.HasEnded)
		worker.Stop()
		if err := wait(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestLeaseIsKeptWhileAHandlerRuns(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{AckWait: 500 * time.Millisecond})
		record := proxy.Publish(task{})
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, Grace: time.Second},
			func(ctx context.Context, _ task, _ *fetchproxy.Message) error {
				select {
				case <-time.After(1500 * time.Millisecond):
				case <-ctx.Done():
				}
				return ctx.Err()
			})
		proxy.Run(worker)
		settlements(t, record, ack)
		events.check(1, "acked")
	})
}

func TestRefusalEndsTheWorkerWithItsReason(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		for _, reason := range []string{"NOT_ALLOWED", "REQUEST_TOO_LARGE"} {
			proxy := fetchproxytest.New(t, fetchproxytest.Options{})
			proxy.Fail(method(mode), reason)
			worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
				func(context.Context, task, *fetchproxy.Message) error { return nil })
			var failed *fetchproxy.Error
			if err := begin(t, worker)(); !errors.As(err, &failed) || failed.Reason != reason {
				t.Errorf("the worker ended with %v", err)
			}
			events.check(0, "ready")
		}
	})
}

func TestSettlementThatIsRefusedLosesItsMessage(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		record := proxy.Publish(task{})
		proxy.FailSettlement("JETSTREAM_DENIED")
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(_ context.Context, _ task, message *fetchproxy.Message) error {
				if message.DeliveryCount == 1 {
					time.AfterFunc(50*time.Millisecond, func() { proxy.Expire(record) })
				}
				return nil
			})
		proxy.Run(worker)
		settlements(t, record, ack)
		events.check(1, "lost", "acked")
		if lost := events.of(1)[0]; lost.Reason != "JETSTREAM_DENIED" {
			t.Errorf("the reason is %s", lost.Reason)
		}
	})
}

func TestFailureThatPassesIsRepeated(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		record := proxy.Publish(task{})
		proxy.Fail(method(mode), "NATS_UNAVAILABLE")
		proxy.FailSettlement("LEASE_BUSY")
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(context.Context, task, *fetchproxy.Message) error { return nil })
		proxy.Run(worker)
		settlements(t, record, ack)
		events.check(0, "ready", "retry", "retry", "stopped")
		for place, reason := range []string{1: "NATS_UNAVAILABLE", 2: "LEASE_BUSY"} {
			event := events.of(0)[place]
			if event.Reason != reason && place > 0 {
				t.Errorf("the reason is %s instead of %s", event.Reason, reason)
			}
			if place > 0 && (event.Wait < 50*time.Millisecond || event.Detail == "") {
				t.Errorf("the event is %+v", event)
			}
		}
	})
}

func TestMessagesOutliveTheirConnection(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		for range 8 {
			proxy.Publish(task{})
		}
		begun, finish := make(chan struct{}, 8), make(chan struct{})
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, Concurrency: 4},
			func(context.Context, task, *fetchproxy.Message) error {
				begun <- struct{}{}
				<-finish
				return nil
			})
		go func() {
			for range 4 {
				<-begun
			}
			proxy.Disconnect()
			time.Sleep(20 * time.Millisecond)
			close(finish)
		}()
		proxy.Run(worker)
		for _, record := range proxy.Messages() {
			settlements(t, record, ack)
			events.check(record.Sequence, "acked")
		}
	})
}

func TestLeaseOutlivesItsStreamWhileAHandlerRuns(t *testing.T) {
	t.Parallel()
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	record := proxy.Publish(task{})
	worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Grace: time.Second},
		func(ctx context.Context, _ task, _ *fetchproxy.Message) error {
			proxy.Disconnect()
			select {
			case <-time.After(2500 * time.Millisecond):
			case <-ctx.Done():
			}
			return ctx.Err()
		})
	proxy.Run(worker)
	settlements(t, record, ack)
	events.check(1, "acked")
}

func TestAnswerThatIsLostCostsNothing(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{MaxDeliver: 1})
		record := proxy.Publish(task{})
		proxy.LoseAnswer("Fetch")
		proxy.LoseAnswer("Settle")
		worker, events := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode},
			func(context.Context, task, *fetchproxy.Message) error { return nil })
		wait := begin(t, worker)
		until(t, "the message is acked", func() bool { return events.has(fetchproxy.EventAcked) })
		worker.Stop()
		if err := wait(); err != nil {
			t.Fatal(err)
		}
		settlements(t, record, ack)
		events.check(1, "acked")
	})
}

func TestFetchWhoseAnswerIsLostIsGivenBackAtAStop(t *testing.T) {
	t.Parallel()
	proxy := fetchproxytest.New(t, fetchproxytest.Options{})
	proxy.Publish(task{})
	proxy.LoseAnswer("Fetch")
	var worker *fetchproxy.Worker
	worker, _ = newWorker(t, proxy, fetchproxy.WorkerOptions{
		Mode: fetchproxy.ModeFetch,
		OnEvent: func(event fetchproxy.Event) {
			if event.Name == fetchproxy.EventRetry {
				worker.Stop()
			}
		},
	}, func(context.Context, task, *fetchproxy.Message) error { return nil })
	if err := begin(t, worker)(); err != nil {
		t.Fatal(err)
	}
	if message := fetchOne(t, proxy.Client()); message.DeliveryCount != 2 {
		t.Errorf("attempt %d instead of 2", message.DeliveryCount)
	}
}

func TestManyMessagesAreEachDoneOnce(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode fetchproxy.Mode) {
		proxy := fetchproxytest.New(t, fetchproxytest.Options{})
		for n := range 2000 {
			proxy.Publish(task{Name: fmt.Sprint(n)})
		}
		worker, _ := newWorker(t, proxy, fetchproxy.WorkerOptions{Mode: mode, Concurrency: 100},
			func(context.Context, task, *fetchproxy.Message) error { return nil })
		proxy.Run(worker)
		for _, record := range proxy.Messages() {
			settlements(t, record, ack)
		}
	})
}

func method(mode fetchproxy.Mode) string {
	if mode == fetchproxy.ModeFetch {
		return "Fetch"
	}
	return "Consume"
}
