// The worker loop: fetch a batch, handle its messages one after the other, fetch the next.
//
// Put your own work into handle, at the end. handle need not know about leases. To work on more messages
// at a time, start more workers.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "worker/gen/fetchproxy/v1"
)

func main() {
	stop, done := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer done()
	client, err := Dial(cmp.Or(os.Getenv("FETCH_PROXY_ADDR"), "127.0.0.1:50051"))
	n, badBatch := strconv.ParseUint(cmp.Or(os.Getenv("BATCH"), "10"), 10, 32)
	maxWait, badWait := time.ParseDuration(cmp.Or(os.Getenv("MAX_WAIT"), "10") + "s")
	if err := errors.Join(err, badBatch, badWait); err != nil {
		log.Fatal(err)
	}
	request := &pb.FetchRequest{
		Stream:   os.Getenv("STREAM"),
		Consumer: os.Getenv("CONSUMER"),
		N:        uint32(n),
		MaxWait:  durationpb.New(maxWait),
		MaxBytes: MaxBytes,
		Codec:    pb.Codec_CODEC_JSON,
		Worker:   "examples/go",
	}
	Say(Line{Event: "ready"})
	for stop.Err() == nil {
		batch, err := Fetch(stop, client, request)
		if err != nil {
			log.Fatal(err)
		}
		for _, lease := range batch.Leases {
			if lease.Begin() {
				workOn(lease)
			}
		}
		batch.Wait()
	}
	Say(Line{Event: "stopped"})
}

// workOn decides the outcome of the message by the result of the work.
func workOn(lease *Lease) {
	fail := func(why any) {
		log.Printf("message %d: %v", lease.GetStreamSequence(), why)
		lease.Nak(5 * time.Second)
	}
	defer func() {
		if panicked := recover(); panicked != nil {
			fail(fmt.Sprintf("panic: %v\n%s", panicked, debug.Stack()))
		}
	}()
	var transient Transient
	var poison Poison
	switch err := handle(lease.Context(), lease.Delivery); {
	case err == nil:
		lease.Ack()
	case errors.As(err, &transient):
		lease.Nak(transient.Delay)
	case errors.As(err, &poison):
		lease.Term(poison.Reason)
	default:
		fail(err)
	}
}

// handle is the work itself: the task says what to do. The ctx is cancelled when the lease is lost, because
// another worker may have the message then.
func handle(ctx context.Context, message *pb.Delivery) error {
	var task struct {
		Do                    string
		Times, Delay, Seconds float64
	}
	if message.GetText() == "" { // A tombstone or a consumer of headers only: nothing to do.
		return nil
	}
	if err := json.Unmarshal([]byte(message.GetText()), &task); err != nil {
		return Poison{fmt.Sprintf("not a task: %v", err)}
	}
	switch task.Do {
	case "ok", "headers":
	case "fail":
		if float64(message.GetDeliveryCount()) <= task.Times {
			return Transient{seconds(task.Delay)}
		}
	case "slow":
		select {
		case <-time.After(seconds(task.Seconds)):
		case <-ctx.Done():
			return ctx.Err()
		}
	case "poison":
		return Poison{"the task says so"}
	default:
		return Poison{fmt.Sprintf("unknown task %q", task.Do)}
	}
	return nil
}

// A number that is too large for a Duration becomes a century.
func seconds(n float64) time.Duration {
	return time.Duration(min(n, 3e9) * float64(time.Second))
}
