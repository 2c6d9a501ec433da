//! Things that go wrong, one after another at moments that the dice choose, with quiet in between.
//! Owns nats-server and the two relays.

use std::{sync::Arc, time::Duration};

use testkit::{
    delivery_log::{DeliveryLog, FaultKind},
    dice::Dice,
    nats_server::NatsServer,
    relay::{Flow, Relay},
};
use tokio::{
    task::block_in_place,
    time::{sleep, timeout},
};

pub struct Faults {
    pub nats: NatsServer,
    /// Between the proxy and NATS.
    pub nats_wire: Relay,
    /// Between some of the workers and the proxy.
    pub worker_wire: Relay,
    pub log: Arc<DeliveryLog>,
    pub dice: Dice,
}

/// A fault, and what it does.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill,
    Stop,
    Cut,
    Close,
    Stall(bool, bool),
    Delay,
    HalfClose,
    WorkersCut,
    WorkersClose,
    WorkersStall,
}

impl Faults {
    /// One fault after another for this long; everything works again when it returns.
    pub async fn run(&mut self, length: Duration) {
        // Cut off by the clock anywhere but in between, a fault would not be mended.
        let end = tokio::time::Instant::now() + length;
        while tokio::time::Instant::now() < end {
            let quiet = self.dice.millis(1500..6000);
            sleep(quiet.min(end.duration_since(tokio::time::Instant::now()))).await;
            if tokio::time::Instant::now() < end {
                let (fault, lasts) = self.choose();
                self.strike(fault, lasts).await;
            }
        }
    }

    fn choose(&mut self) -> (Fault, Duration) {
        let dice = &mut self.dice;
        let fault = match dice.within(0..20) {
            0..3 => Fault::Kill,
            3..6 => Fault::Stop,
            6..8 => Fault::Cut,
            8..10 => Fault::Close,
            10 => Fault::Stall(true, true),
            11 => Fault::Stall(true, false),
            12 => Fault::Stall(false, true),
            13 | 14 => Fault::Delay,
            15 => Fault::HalfClose,
            16 | 17 => Fault::WorkersCut,
            18 => Fault::WorkersClose,
            _ => Fault::WorkersStall,
        };
        let lasts = match fault {
            Fault::Kill => dice.millis(100..3000),
            Fault::Cut | Fault::WorkersCut => Duration::ZERO,
            Fault::HalfClose => Duration::from_secs(1),
            _ => dice.millis(1000..8000),
        };
        (fault, lasts)
    }

    async fn strike(&mut self, fault: Fault, lasts: Duration) {
        let kind = match fault {
            Fault::Kill => FaultKind::Crash,
            Fault::WorkersCut | Fault::WorkersClose | Fault::WorkersStall => FaultKind::Workers,
            _ => FaultKind::Nats,
        };
        let number = self.log.begins(kind, format!("{fault:?} for {lasts:.1?}"));
        let delay = Flow::Delay(self.dice.millis(5..100));
        match fault {
            Fault::Kill => block_in_place(|| self.nats.kill()),
            Fault::Stop => self.nats.signal("STOP"),
            Fault::Cut => self.nats_wire.cut(),
            Fault::Close => self.nats_wire.close(),
            Fault::Stall(up, down) => self.nats_wire.flow(stall(up), stall(down)),
            Fault::Delay => self.nats_wire.flow(delay, delay),
            Fault::HalfClose => self.nats_wire.half_close(),
            Fault::WorkersCut => self.worker_wire.cut(),
            Fault::WorkersClose => self.worker_wire.close(),
            Fault::WorkersStall => self.worker_wire.flow(Flow::Stall, Flow::Stall),
        }
        sleep(lasts).await;
        self.log.mends(number);
        match fault {
            Fault::Kill => block_in_place(|| self.nats.restart()),
            Fault::Stop => self.nats.signal("CONT"),
            Fault::Close => self.nats_wire.open(),
            Fault::Stall(..) | Fault::Delay => self.nats_wire.flow(Flow::Pass, Flow::Pass),
            Fault::WorkersClose => self.worker_wire.open(),
            Fault::WorkersStall => self.worker_wire.flow(Flow::Pass, Flow::Pass),
            Fault::Cut | Fault::HalfClose | Fault::WorkersCut => {}
        }
        self.reachable().await;
        self.log.over(number);
    }

    /// Waits until NATS answers on a connection of its own.
    async fn reachable(&self) {
        let connect = || async_nats::connect(self.nats.url());
        while !matches!(timeout(Duration::from_secs(1), connect()).await, Ok(Ok(_))) {
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn stall(stalled: bool) -> Flow {
    if stalled { Flow::Stall } else { Flow::Pass }
}
