// The worker of the conformance suite: examples/conformance.json says what a task may ask for. It prints a line
// of JSON for each event.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	"fetchproxy"
)

// Task is the payload of a message.
type Task struct {
	Do                    string
	Times, Delay, Seconds float64
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

func main() {
	client, err := fetchproxy.NewClientFromEnv()
	if err != nil {
		log.Fatal(err)
	}
	options := fetchproxy.WorkerOptions{
		Concurrency: int(number("CONCURRENCY", 0)),
		Grace:       seconds(number("GRACE", 10)),
		OnEvent:     onEvent,
		Name:        "clients/go",
	}
	if options.Concurrency == 0 {
		options.Mode = fetchproxy.ModeFetch
		options.Concurrency = 1
		options.Batch = int(number("BATCH", 10))
		options.MaxWait = seconds(number("MAX_WAIT", 10))
	}
	handler := fetchproxy.JSON(handle)
	worker, err := fetchproxy.NewWorker(client, os.Getenv("STREAM"), os.Getenv("CONSUMER"), handler, options)
	if err != nil {
		log.Fatal(err)
	}
	if err := worker.RunUntilSignal(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func handle(ctx context.Context, task Task, message *fetchproxy.Message) error {
	if message.NoPayload() {
		return nil
	}
	switch task.Do {
	case "ok", "headers":
	case "fail":
		if float64(message.DeliveryCount) <= task.Times {
			return fetchproxy.Nak(seconds(task.Delay))
		}
	case "slow":
		select {
		case <-time.After(seconds(task.Seconds)):
		case <-ctx.Done():
			return ctx.Err()
		}
	case "poison":
		return fetchproxy.Term("the task says so")
	default:
		return fetchproxy.Term(fmt.Sprintf("unknown task %q", task.Do))
	}
	return nil
}

func onEvent(event fetchproxy.Event) {
	fetchproxy.LogEvent(event)
	if event.Name == fetchproxy.EventHandlerError {
		return // The Nak that follows has a line.
	}
	line := Line{Event: string(event.Name)}
	switch message := event.Message; {
	case message != nil:
		line.Sequence, line.Deliveries, line.Headers = message.StreamSequence, message.DeliveryCount, message.Headers
		_ = json.Unmarshal(message.Payload, &struct{ ID *json.RawMessage }{&line.ID})
	case event.Name == fetchproxy.EventRetry:
		line.Reason, line.Message, line.In = event.Reason, event.Detail, event.Wait.Seconds()
	}
	_ = json.NewEncoder(os.Stdout).Encode(line)
}

// number reads an environment variable.
func number(name string, unset float64) float64 {
	n, err := strconv.ParseFloat(cmp.Or(os.Getenv(name), fmt.Sprint(unset)), 64)
	if err != nil || n < 0 {
		log.Fatalf("%s must be a number, not %q", name, os.Getenv(name))
	}
	return n
}

// A number that is too large for a Duration becomes a century.
func seconds(n float64) time.Duration {
	return time.Duration(min(n, 3e9) * float64(time.Second))
}
