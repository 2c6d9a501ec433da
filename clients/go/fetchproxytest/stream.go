package fetchproxytest

import (
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "fetchproxy/gen/fetchproxy/v1"
)

// stream is one call of Consume.
type stream struct {
	service *service
	start   *pb.ConsumeStart
	terms   terms
	grace   time.Duration

	leases   map[uint64]*lease // All, by number.
	held     map[uint64]*lease // Those that this stream has not settled, and whose end it has not told.
	last     uint64            // The last number.
	credit   uint32
	creditID uint64
	isHalf   bool // The client has half-closed it.
}

func (s *service) Consume(wire grpc.BidiStreamingServer[pb.ConsumeRequest, pb.ConsumeResponse]) error {
	first, err := wire.Recv()
	if err != nil {
		return err
	}
	p := s.proxy
	p.mutex.Lock()
	reason, broken := s.failure("Consume"), p.broken
	p.mutex.Unlock()
	if reason != "" {
		return statusOf(reason, "the test lets this Consume fail")
	}
	if first.GetStart() == nil {
		return statusOf("INVALID_FIELD", "the first frame has no start")
	}
	c := newStream(s, first.GetStart())
	defer c.end()
	return c.run(wire, first, broken)
}

func newStream(s *service, start *pb.ConsumeStart) *stream {
	c := &stream{
		service: s,
		start:   start,
		leases:  map[uint64]*lease{},
		held:    map[uint64]*lease{},
		credit:  1,
		terms: terms{
			codec: start.GetCodec(), maxBytes: start.GetMaxFrameBytes(), length: s.proxy.queue.ackWait,
		},
	}
	if start.GetLease() != nil {
		c.terms.length = start.GetLease().AsDuration()
	}
	if keep := start.GetKeep(); keep != nil {
		c.terms.length, c.grace = time.Hour, 10*time.Second
		if keep.AtMost != nil {
			c.terms.length = keep.AtMost.AsDuration()
		}
		if keep.Grace != nil {
			c.grace = keep.Grace.AsDuration()
		}
	}
	c.setCredit(start.GetCredit())
	return c
}

func (c *stream) setCredit(credit *pb.ConsumeCredit) {
	if credit != nil && credit.MaxLeases != nil {
		c.credit, c.creditID = credit.GetMaxLeases(), credit.GetId()
	}
}

func (c *stream) run(
	wire grpc.BidiStreamingServer[pb.ConsumeRequest, pb.ConsumeResponse],
	first *pb.ConsumeRequest, broken chan struct{},
) error {
	heartbeat := 10 * time.Second
	if c.start.Heartbeat != nil {
		heartbeat = c.start.Heartbeat.AsDuration()
	}
	frames, failed := make(chan *pb.ConsumeRequest), make(chan error, 1)
	go func() {
		for {
			frame, err := wire.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case frames <- frame:
			case <-wire.Context().Done():
				return
			}
		}
	}()
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	answer := &pb.ConsumeResponse{Opened: &pb.ConsumeOpened{
		Heartbeat: durationpb.New(heartbeat), MaxLeases: c.credit, MaxFrameBytes: c.start.MaxFrameBytes,
		Grace: durationpb.New(c.grace),
	}}
	if err := c.take(first, answer); err != nil {
		return err
	}
	for {
		isDone, changed, next := c.fill(answer)
		if proto.Size(answer) > 0 {
			if err := wire.Send(answer); err != nil {
				return err
			}
		}
		if isDone {
			return nil
		}
		answer = &pb.ConsumeResponse{}
		timer := time.NewTimer(time.Until(next))
		select {
		case frame := <-frames:
			if err := c.take(frame, answer); err != nil {
				return err
			}
		case err := <-failed:
			if !errors.Is(err, io.EOF) {
				return err
			}
			c.isHalf, failed = true, nil
		case <-changed:
		case <-timer.C:
		case <-beat.C:
			if err := wire.Send(answer); err != nil {
				return err
			}
		case <-broken:
			return errBroken
		case <-wire.Context().Done():
			return status.Error(codes.Canceled, "the caller has left")
		}
		timer.Stop()
	}
}

// take carries out a frame of the client.
func (c *stream) take(frame *pb.ConsumeRequest, answer *pb.ConsumeResponse) error {
	defer c.service.lock()()
	p := c.service.proxy
	if credit := frame.GetCredit(); credit != nil {
		c.setCredit(credit)
		answer.CreditId = c.creditID
	}
	if frame.GetSettle() == nil {
		return nil
	}
	result := &pb.ConsumeResult{Id: frame.GetSettle().GetId()}
	answer.Results = append(answer.Results, result)
	for _, settlement := range frame.GetSettle().GetSettlements() {
		l := c.leases[settlement.GetNumber()]
		if settlement.GetNumber() == 0 {
			l = p.queue.leases[settlement.GetToken()]
		}
		one := p.queue.settle(time.Now(), l, settlement)
		result.Results = append(result.Results, one)
		if one.GetError() != nil {
			result.Failed++
		}
		if l != nil && l.isOver {
			delete(c.held, settlement.GetNumber())
		}
	}
	p.change()
	if c.service.isLost("Settle") {
		return errBroken
	}
	return nil
}

// fill adds messages for which there is credit, and leases that have ended. It returns whether the stream is done,
// and when to look again.
func (c *stream) fill(answer *pb.ConsumeResponse) (isDone bool, changed chan struct{}, next time.Time) {
	defer c.service.lock()()
	p, now := c.service.proxy, time.Now()
	p.queue.expire(now)
	for number, l := range c.held {
		if l.isOver {
			why := refusal("LEASE_EXPIRED", "the lease has ended", nil).GetError()
			answer.Ended = append(answer.Ended, &pb.ConsumeEnded{Number: number, Why: why})
			delete(c.held, number)
		}
	}
	for !c.isHalf && len(c.held) < int(c.credit) && len(p.queue.ready) > 0 {
		l, delivery, rejected := p.queue.deliver(now, c.terms)
		if l != nil {
			c.last++
			l.number = c.last
			c.leases[l.number], c.held[l.number] = l, l
		}
		if delivery != nil {
			delivery.Number = l.number
			answer.Messages = append(answer.Messages, delivery)
			continue
		}
		if l != nil {
			rejected.Number = l.number
		}
		answer.Rejected = append(answer.Rejected, rejected)
		p.change()
	}
	return c.isHalf, p.changed, p.queue.next(now)
}

// end lets the leases live for the grace.
func (c *stream) end() {
	defer c.service.lock()()
	for _, l := range c.held {
		if last := time.Now().Add(c.grace); !l.isOver && c.start.GetKeep() != nil && last.Before(l.ends) {
			l.ends = last
		}
	}
	c.service.proxy.change()
}
