// The worker loop: fetch a batch, handle its messages one after the other, settle each.
//
// Put your own work into handle, at the end; it need know nothing of leases. To work on more
// messages at a time, start more workers.
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
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "worker/gen/fetchproxy/v1"
)

// How long an outcome may wait for others of its batch, to be settled with them in one call.
const gather = 100 * time.Millisecond

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := work(ctx); err != nil {
		log.Fatalf("worker: %v", err)
	}
}

// work goes on until ctx ends, or until a Fetch is refused for good.
func work(ctx context.Context) error {
	request, err := requestFromEnv()
	if err != nil {
		return err
	}
	addresses := strings.Split(cmp.Or(os.Getenv("FETCH_PROXY_ADDR"), "127.0.0.1:50051"), ",")
	proxy, err := Dial(addresses, func(reason string, wait time.Duration) {
		say(line{"event": "retry", "reason": reason, "in": wait.Seconds()})
	})
	if err != nil {
		return err
	}
	defer proxy.Close()

	say(line{"event": "ready"})
	for ctx.Err() == nil {
		answer, err := proxy.Fetch(ctx, request)
		if err != nil {
			return err
		}
		for _, rejected := range answer.GetRejected() {
			log.Printf("message %d rejected: %s", rejected.GetStreamSequence(), rejected.GetDetail())
			say(about(rejected, "rejected"))
			proxy.Refuse(rejected)
		}
		workThrough(ctx, proxy.Hold(answer.GetMessages()))
	}
	say(line{"event": "stopped"})
	return nil
}

// workThrough handles and settles the messages of a batch. Once ctx has ended, it begins no other.
func workThrough(ctx context.Context, batch *Batch) {
	defer batch.Release()
	for _, lease := range batch.Leases {
		if ctx.Err() != nil {
			lease.Return()
		} else if !lease.Lost() {
			decide(lease, handle(lease.Context(), lease.Delivery))
		}
		if batch.Waited() > gather {
			report(batch.Settle())
		}
	}
	report(batch.Settle())
}

// decide says what is to become of a message.
func decide(lease *Lease, err error) {
	var transient Transient
	var poison Poison
	switch {
	case err == nil:
		lease.Ack()
	case errors.As(err, &transient):
		lease.Nak(transient.Delay)
	case errors.As(err, &poison):
		lease.Term(poison.Reason)
	default:
		log.Printf("message %d: %v", lease.GetStreamSequence(), err)
		lease.Nak(5 * time.Second)
	}
}

// A task says what is to be done with it.
type task struct {
	ID                    any
	Do                    string
	Times, Delay, Seconds float64
}

// handle is the work itself. Its ctx ends when the message may have been given to another worker.
func handle(ctx context.Context, message *pb.Delivery) error {
	var task task
	if err := json.Unmarshal([]byte(message.GetText()), &task); err != nil {
		return Poison{fmt.Sprintf("not a task: %v", err)}
	}
	switch task.Do {
	case "ok", "headers":
		return nil
	case "fail":
		if float64(message.GetDeliveryCount()) <= task.Times {
			return Transient{seconds(task.Delay)}
		}
		return nil
	case "slow":
		select {
		case <-time.After(seconds(task.Seconds)):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	case "poison":
		return Poison{"the task says so"}
	default:
		return Poison{fmt.Sprintf("unknown task %q", task.Do)}
	}
}

// report tells how the settling of messages ended.
func report(settled []*Lease) {
	for _, lease := range settled {
		var task task
		_ = json.Unmarshal([]byte(lease.GetText()), &task) // Poison has no id.
		line := about(lease, string(lease.Outcome()))
		line["id"] = task.ID
		if task.Do == "headers" && lease.Outcome() == Acked {
			headers := map[string][]string{}
			for name, values := range lease.GetHeaders() {
				headers[name] = values.GetValues()
			}
			line["headers"] = headers
		}
		say(line)
	}
}

// A line of standard output, as JSON.
type line map[string]any

func say(line line) {
	_ = json.NewEncoder(os.Stdout).Encode(line)
}

func about(message interface {
	GetStreamSequence() uint64
	GetDeliveryCount() uint32
}, event string) line {
	return line{
		"event":      event,
		"sequence":   message.GetStreamSequence(),
		"deliveries": message.GetDeliveryCount(),
		"id":         nil,
	}
}

func requestFromEnv() (*pb.FetchRequest, error) {
	stream, consumer := os.Getenv("STREAM"), os.Getenv("CONSUMER")
	if stream == "" || consumer == "" {
		return nil, errors.New("STREAM and CONSUMER must be set")
	}
	batch, err := strconv.ParseUint(cmp.Or(os.Getenv("BATCH"), "10"), 10, 32)
	if err != nil {
		return nil, fmt.Errorf("BATCH: %w", err)
	}
	maxWait, err := strconv.ParseFloat(cmp.Or(os.Getenv("MAX_WAIT"), "10"), 64)
	if err != nil {
		return nil, fmt.Errorf("MAX_WAIT: %w", err)
	}
	return &pb.FetchRequest{
		Stream:   stream,
		Consumer: consumer,
		N:        uint32(batch),
		MaxWait:  durationpb.New(seconds(maxWait)),
		MaxBytes: MaxBytes,
		Codec:    pb.Codec_CODEC_JSON,
		Worker:   "examples/go",
	}, nil
}

func seconds(n float64) time.Duration {
	return time.Duration(n * float64(time.Second))
}
