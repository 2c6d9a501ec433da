// Does the work of one mode for each line that it reads, for the bench that compares native clients.
//
// A line is: MODE CONSUMER WORKERS MESSAGES. The answer is: done COUNT. All workers of a kind share one connection.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"fetchproxy"
	pb "fetchproxy/gen/fetchproxy/v1"
)

const wait = time.Second

var (
	background = context.Background()
	stream     = os.Getenv("STREAM")
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Fetches up to n messages and confirms each, all acks at once. Returns how many there were.
func native(consumer jetstream.Consumer, n int) int {
	batch, err := consumer.Fetch(n, jetstream.FetchMaxWait(wait))
	check(err)
	var acks sync.WaitGroup
	count := 0
	for message := range batch.Messages() {
		count++
		if n == 1 {
			check(message.DoubleAck(background))
			continue
		}
		acks.Go(func() { check(message.DoubleAck(background)) })
	}
	acks.Wait()
	return count
}

// Fetches up to n messages. One message is acked by an Ack, more by a Settle.
func proxied(client pb.FetchServiceClient, consumer string, n int) int {
	request := &pb.FetchRequest{
		Stream: stream, Consumer: consumer, N: uint32(n), MaxWait: durationpb.New(wait),
	}
	answer, err := client.Fetch(background, request)
	check(err)
	if n == 1 {
		for _, message := range answer.Messages {
			_, err := client.Ack(background, &pb.AckRequest{Token: message.Token})
			check(err)
		}
		return len(answer.Messages)
	}
	settle := &pb.SettleRequest{}
	for _, message := range answer.Messages {
		ack := &pb.Settlement_Ack{Ack: &pb.AckAction{}}
		settlement := &pb.Settlement{Token: message.Token, Action: ack}
		settle.Settlements = append(settle.Settlements, settlement)
	}
	if len(settle.Settlements) == 0 {
		return 0
	}
	settled, err := client.Settle(background, settle)
	check(err)
	if settled.Failed > 0 {
		check(fmt.Errorf("%d settlements failed", settled.Failed))
	}
	return len(answer.Messages)
}

// Runs a worker of the client package until so many messages are acked. Returns their number.
func packaged(client *fetchproxy.Client, consumer string, concurrency, messages int) int64 {
	var worker *fetchproxy.Worker
	var done atomic.Int64
	handler := fetchproxy.Bytes(func(context.Context, []byte, *fetchproxy.Message) error {
		if done.Add(1) == int64(messages) {
			worker.Stop()
		}
		return nil
	})
	options := fetchproxy.WorkerOptions{Concurrency: concurrency}
	worker, err := fetchproxy.NewWorker(client, stream, consumer, handler, options)
	check(err)
	check(worker.Run(background))
	return done.Load()
}

func main() {
	connection, err := nats.Connect(os.Getenv("NATS_URL"))
	check(err)
	js, err := jetstream.New(connection)
	check(err)
	credentials := grpc.WithTransportCredentials(insecure.NewCredentials())
	channel, err := grpc.NewClient(os.Getenv("FETCH_PROXY_ADDR"), credentials)
	check(err)
	client := pb.NewFetchServiceClient(channel)
	packageClient, err := fetchproxy.NewClient(os.Getenv("FETCH_PROXY_ADDR"), fetchproxy.ClientOptions{})
	check(err)
	fmt.Println("ready")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var mode, consumer string
		var workers, messages int
		_, err := fmt.Sscan(lines.Text(), &mode, &consumer, &workers, &messages)
		check(err)
		if mode == "package-16" {
			fmt.Println("done", packaged(packageClient, consumer, 16, messages))
			continue
		}
		handle, err := js.Consumer(background, stream, consumer)
		check(err)
		round := map[string]func() int{
			"native-1":   func() int { return native(handle, 1) },
			"native-16":  func() int { return native(handle, 16) },
			"native-100": func() int { return native(handle, 100) },
			"proxy-1":    func() int { return proxied(client, consumer, 1) },
			"proxy-100":  func() int { return proxied(client, consumer, 100) },
		}[mode]
		var done atomic.Int64
		var all sync.WaitGroup
		for range workers {
			all.Go(func() {
				for done.Load() < int64(messages) {
					done.Add(int64(round()))
				}
			})
		}
		all.Wait()
		fmt.Println("done", done.Load())
	}
}
