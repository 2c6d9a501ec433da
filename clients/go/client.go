package fetchproxy

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "fetchproxy/gen/fetchproxy/v1"
)

const (
	// The largest answer to ask for. The received answer may be a little larger.
	mostBytes = 16 << 20
	// The windows of HTTP/2.
	window = 1 << 20
	// The longest wait before a new connection, which is 2 s by docs/how-to/configure-the-channel.md.
	longestConnect = 2 * time.Second
	defaultMaxWait = 10 * time.Second
	// A Fetch has this time in addition to its max_wait. The proxy answers well before.
	patience = 5 * time.Second
	// The deadline of a settlement.
	settleDeadline = 10 * time.Second
	// The deadline of a GiveBack whose caller has no time left.
	farewell = time.Second
	// How often a call is made, at the most.
	mostTries = 5
)

// ClientOptions has the credentials of a client. All fields may be empty. A file that changes counts without a
// restart: files of TLS for the next connection, and a bearer file for the next call.
type ClientOptions struct {
	// CA is the file of the authorities to trust, in PEM. Empty: those of the system.
	CA string
	// Cert and Key are the files of the certificate of the client and of its key, in PEM.
	Cert, Key string
	// BearerFile is the file of an API key or a token, which goes with each call.
	BearerFile string
	// DialOptions are further options of gRPC. They win over those of the package.
	DialOptions []grpc.DialOption
}

// Client is a channel to one proxy, or to all replicas of a name. Many workers and goroutines may share it. A
// stream belongs to one connection, so workers under heavy load should have a client of their own.
type Client struct {
	conn    *grpc.ClientConn
	service pb.FetchServiceClient
}

// NewClient makes a client for "host:port", for "https://host:port" with TLS, or for all addresses of
// "dns:///name:port". It connects when it is used. A bearer file without TLS is refused, unless the proxy is on
// this machine.
func NewClient(address string, options ClientOptions) (*Client, error) {
	target, hasTLS := strings.CutPrefix(address, "https://")
	var transport credentials.TransportCredentials = insecure.NewCredentials()
	if (options.Cert == "") != (options.Key == "") {
		return nil, fmt.Errorf("a certificate and its key must both be set, or both be empty")
	}
	if hasTLS {
		files := &files{ca: options.CA, cert: options.Cert, key: options.Key}
		if _, err := files.transport(); err != nil {
			return nil, err
		}
		transport = files
	}
	delays := backoff.Config{BaseDelay: firstWait, Multiplier: 2, Jitter: 0.2, MaxDelay: longestConnect}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(mostBytes + 1<<20)),
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 30 * time.Second, PermitWithoutStream: true,
		}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: delays, MinConnectTimeout: longestWait}),
		grpc.WithUserAgent("fetchproxy-go/" + Version),
	}
	if options.BearerFile != "" {
		if !hasTLS && !isHere(target) {
			return nil, fmt.Errorf("a credential is not sent to %s without TLS: use https://", address)
		}
		dial = append(dial, grpc.WithPerRPCCredentials(bearer(options.BearerFile)))
	}
	conn, err := grpc.NewClient(target, append(dial, options.DialOptions...)...)
	if err != nil {
		return nil, err
	}
	return &Client{conn, pb.NewFetchServiceClient(conn)}, nil
}

// NewClientFromEnv makes a client by FETCH_PROXY_ADDR, FETCH_PROXY_CA, FETCH_PROXY_CERT, FETCH_PROXY_KEY and
// FETCH_PROXY_BEARER_FILE. The address is 127.0.0.1:50051 unless it is set.
func NewClientFromEnv() (*Client, error) {
	return NewClient(cmp.Or(os.Getenv("FETCH_PROXY_ADDR"), "127.0.0.1:50051"), ClientOptions{
		CA:         os.Getenv("FETCH_PROXY_CA"),
		Cert:       os.Getenv("FETCH_PROXY_CERT"),
		Key:        os.Getenv("FETCH_PROXY_KEY"),
		BearerFile: os.Getenv("FETCH_PROXY_BEARER_FILE"),
	})
}

// Close closes the channel. Workers must have stopped before.
func (c *Client) Close() error { return c.conn.Close() }

// Service returns the generated client, for calls and fields that this package does not have.
func (c *Client) Service() pb.FetchServiceClient { return c.service }

// FetchOptions are the options of a Fetch.
type FetchOptions struct {
	// N is the most messages to take: 1 to 1000. 0 is 1.
	N int
	// MaxWait is the longest wait for a first message, up to 5 min. 0 is 10 s. A negative wait takes only what is
	// available now.
	MaxWait time.Duration
	// Lease is how long each message is leased: 1 s or more. 0 is the ack wait of the consumer.
	Lease time.Duration
	// MaxBytes is the most bytes of the answer: 1 KiB to 16 MiB. 0 is 16 MiB.
	MaxBytes int
}

// Batch is the answer of a Fetch.
type Batch struct {
	// Messages are leased to the caller, who must settle each of them.
	Messages []*Message
	// Rejected has the messages that cannot be delivered. A message with a token must be settled, too.
	Rejected []*Rejected
	// EmptyReason says why there are no messages.
	EmptyReason pb.EmptyReason
	// Pending is the number of messages that the consumer has not delivered yet, as last seen.
	Pending uint64
	// AckPending is the number of messages that are delivered and not settled, if the answer is empty.
	AckPending uint64
}

// Fetch takes messages of a consumer. Its deadline is MaxWait and 5 s. A repeat has the same attempt, so an answer
// that was lost comes again. A Fetch that fails is given back. Its error is an [*Error].
func (c *Client) Fetch(
	ctx context.Context, stream, consumer string, options FetchOptions,
) (*Batch, error) {
	request := &pb.FetchRequest{
		Stream:    stream,
		Consumer:  consumer,
		N:         uint32(max(options.N, 1)),
		MaxWait:   durationpb.New(max(cmp.Or(options.MaxWait, defaultMaxWait), 0)),
		MaxBytes:  uint32(cmp.Or(options.MaxBytes, mostBytes)),
		AttemptId: rand.Text(),
	}
	if options.Lease != 0 {
		request.Lease = durationpb.New(options.Lease)
	}
	answer, err := call(ctx, fetchDeadline(request), func(ctx context.Context) (*pb.FetchResponse, error) {
		answer, err := c.service.Fetch(ctx, request)
		request.AttemptAgain = true
		return answer, err
	})
	if err != nil {
		if failed := callError(ctx, err); failed.repeatable {
			c.forget(request)
		}
		return nil, err
	}
	batch := &Batch{
		EmptyReason: answer.GetEmptyReason(),
		Pending:     answer.GetPending(),
		AckPending:  answer.GetAckPending(),
	}
	for _, delivery := range answer.GetMessages() {
		batch.Messages = append(batch.Messages, newMessage(stream, consumer, delivery))
	}
	for _, rejected := range answer.GetRejected() {
		batch.Rejected = append(batch.Rejected, newRejected(stream, consumer, rejected))
	}
	return batch, nil
}

func fetchDeadline(request *pb.FetchRequest) time.Duration {
	return request.GetMaxWait().AsDuration() + patience
}

// forget returns the messages of a Fetch whose answer nobody reads. If it fails, they come back when their leases
// end.
func (c *Client) forget(request *pb.FetchRequest) {
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	_, _ = c.service.GiveBack(ctx, &pb.GiveBackRequest{
		Stream: request.Stream, Consumer: request.Consumer, AttemptId: request.AttemptId,
	})
}

// Ack settles a message as done. Its error is an [*Error], like those of all calls that follow. Each call has a
// deadline of 10 s.
func (c *Client) Ack(ctx context.Context, token string) (Outcome, error) {
	answer, err := call(ctx, settleDeadline, func(ctx context.Context) (*pb.AckResponse, error) {
		return c.service.Ack(ctx, &pb.AckRequest{Token: token})
	})
	return answer.GetOutcome(), err
}

// Nak settles a message as not done: it comes back after the delay, which is lowered to [MaxDelay].
func (c *Client) Nak(ctx context.Context, token string, delay time.Duration) (Outcome, error) {
	request := &pb.NakRequest{Token: token, Delay: SettleNak(token, delay).GetNak().GetDelay()}
	answer, err := call(ctx, settleDeadline, func(ctx context.Context) (*pb.NakResponse, error) {
		return c.service.Nak(ctx, request)
	})
	return answer.GetOutcome(), err
}

// Term settles a message as impossible: it does not come back. The reason is cut to [MaxReason].
func (c *Client) Term(ctx context.Context, token, reason string) (Outcome, error) {
	request := &pb.TermRequest{Token: token, Reason: SettleTerm(token, reason).GetTerm().GetReason()}
	answer, err := call(ctx, settleDeadline, func(ctx context.Context) (*pb.TermResponse, error) {
		return c.service.Term(ctx, request)
	})
	return answer.GetOutcome(), err
}

// Extend moves the end of a lease, and returns how long the lease lasts. With 0, that is as long as it was
// granted. Another length below [MinLease] is raised to it.
func (c *Client) Extend(ctx context.Context, token string, lease time.Duration) (time.Duration, error) {
	request := &pb.ExtendRequest{Token: token, Lease: SettleExtend(token, lease).GetExtend().GetLease()}
	answer, err := call(ctx, settleDeadline, func(ctx context.Context) (*pb.ExtendResponse, error) {
		return c.service.Extend(ctx, request)
	})
	return answer.GetLease().AsDuration(), err
}

// Settle carries out 1 to [MaxSettlements] settlements, and returns a result for each of them in order. It fails
// as a whole only if nothing was tried.
func (c *Client) Settle(ctx context.Context, settlements ...*Settlement) ([]SettleResult, error) {
	request := &pb.SettleRequest{Settlements: settlements}
	answer, err := call(ctx, settleDeadline, func(ctx context.Context) (*pb.SettleResponse, error) {
		return c.service.Settle(ctx, request)
	})
	var results []SettleResult
	for _, result := range answer.GetResults() {
		results = append(results, newSettleResult(result))
	}
	return results, err
}

// GiveBack gives back all that a Fetch with this attempt has leased, and returns the number of its messages. It is
// for callers of the generated client: [Client.Fetch] gives back by itself.
func (c *Client) GiveBack(ctx context.Context, stream, consumer, attemptID string) (int, error) {
	request := &pb.GiveBackRequest{Stream: stream, Consumer: consumer, AttemptId: attemptID}
	answer, err := call(ctx, settleDeadline, func(ctx context.Context) (*pb.GiveBackResponse, error) {
		return c.service.GiveBack(ctx, request)
	})
	return int(answer.GetMessages()), err
}

// call makes a call at most mostTries times, each with a deadline of its own. It waits between them.
func call[A any](
	ctx context.Context, deadline time.Duration, try func(ctx context.Context) (A, error),
) (A, error) {
	for failed := 0; ; failed++ {
		one, cancel := context.WithTimeout(ctx, deadline)
		answer, err := try(one)
		cancel()
		if err == nil {
			return answer, nil
		}
		failure := callError(ctx, err)
		if !failure.repeatable || ctx.Err() != nil || failed+1 == mostTries {
			return answer, failure
		}
		sleep(ctx, failure.wait(failed))
	}
}
