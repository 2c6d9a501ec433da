// A worker on the samples of `fetch-proxy dev`.
package main

import (
	"context"
	"log"
	"time"

	"fetchproxy"
)

type Task struct {
	ID   int
	Kind string
}

func main() {
	client, err := fetchproxy.NewClientFromEnv()
	if err != nil {
		log.Fatal(err)
	}
	worker, err := fetchproxy.NewWorker(client, "TASKS", "batch-worker", fetchproxy.JSON(handle), fetchproxy.WorkerOptions{})
	if err != nil {
		log.Fatal(err)
	}
	if err := worker.RunUntilSignal(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func handle(ctx context.Context, task Task, message *fetchproxy.Message) error {
	switch {
	case task.Kind == "broken":
		return fetchproxy.Term("the task is broken")
	case task.Kind == "flaky" && message.DeliveryCount == 1:
		return fetchproxy.Nak(time.Second)
	}
	log.Printf("task %d is done", task.ID)
	return nil
}
