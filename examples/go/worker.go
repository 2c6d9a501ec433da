// The two loops of a worker. With Fetch: fetch a batch, handle its messages one after the other, fetch the
// next. With Consume, if CONCURRENCY is set: handle up to so many messages at once, as they come.
//
// Put your own work into handle, at the end. handle need not know about leases.
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
	if err != nil {
		log.Fatal(err)
	}
	Say(Line{Event: "ready"})
	if concurrency := number("CONCURRENCY", 0); concurrency > 0 {
		err = Consume(stop, client, &pb.ConsumeStart{
			Stream:        os.Getenv("STREAM"),
			Consumer:      os.Getenv("CONSUMER"),
			Credit:        &pb.ConsumeCredit{MaxLeases: new(uint32(concurrency))},
			MaxFrameBytes: MaxBytes,
			Codec:         pb.Codec_CODEC_JSON,
			Worker:        "examples/go",
		}, seconds(number("GRACE", 10)), workOn)
	} else {
		err = fetchLoop(stop, client, &pb.FetchRequest{
			Stream:   os.Getenv("STREAM"),
			Consumer: os.Getenv("CONSUMER"),
			N:        uint32(number("BATCH", 10)),
			MaxWait:  durationpb.New(seconds(number("MAX_WAIT", 10))),
			MaxBytes: MaxBytes,
			Codec:    pb.Codec_CODEC_JSON,
			Worker:   "examples/go",
		})
	}
	if err != nil {
		log.Fatal(err)
	}
	Say(Line{Event: "stopped"})
}

// fetchLoop works on one message after the other until stop ends, or until the proxy refuses the call.
func fetchLoop(stop context.Context, client pb.FetchServiceClient, request *pb.FetchRequest) error {
	for stop.Err() == nil {
		batch, err := Fetch(stop, client, request)
		if err != nil {
			return err
		}
		for _, lease := range batch.Leases {
			if lease.Begin() {
				lease.End(workOn(lease.Context(), lease.Delivery))
			}
		}
		batch.Wait()
	}
	return nil
}

// number reads an environment variable.
func number(name string, unset float64) float64 {
	value := os.Getenv(name)
	if value == "" {
		return unset
	}
	n, err := strconv.ParseFloat(value, 64)
	if err != nil || n < 0 {
		log.Fatalf("%s must be a number, not %q", name, value)
	}
	return n
}

// workOn returns the outcome of the message, by the result of the work.
func workOn(ctx context.Context, message *pb.Delivery) (outcome Outcome) {
	fail := func(why any) Outcome {
		log.Printf("message %d: %v", message.GetStreamSequence(), why)
		return Nak(5 * time.Second)
	}
	defer func() {
		if panicked := recover(); panicked != nil {
			outcome = fail(fmt.Sprintf("panic: %v\n%s", panicked, debug.Stack()))
		}
	}()
	var transient Transient
	var poison Poison
	switch err := handle(ctx, message); {
	case err == nil:
		return Ack()
	case errors.As(err, &transient):
		return Nak(transient.Delay)
	case errors.As(err, &poison):
		return Term(poison.Reason)
	default:
		return fail(err)
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
