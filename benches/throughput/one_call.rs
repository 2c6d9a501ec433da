//! Workers that settle a message on the Fetch of the next one: one call a message.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use fetch_proxy::pb::{self, settlement::Action};

use crate::{
    Half, half,
    proxied::{Client, connect, fetch},
    setup::{Cpu, Setup},
};

/// `clients` workers that fetch one at a time.
pub async fn singles(setup: &Setup, clients: usize, messages: usize) -> Half {
    let clients = connect(&setup.grpc, clients).await;
    singles_of(setup, clients, &setup.cpu_proxied(), messages).await
}

/// The same with these clients, and the CPU of these processes.
pub async fn singles_of(setup: &Setup, clients: Vec<Client>, cpu: &Cpu, messages: usize) -> Half {
    let name = setup.consumer().await;
    half(cpu, async {
        let done = Arc::new(AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for mut client in clients {
            let (request, done) = (fetch(&name, 1), done.clone());
            tasks.spawn(async move {
                let mut settlements = Vec::new();
                while done.load(Ordering::Relaxed) < messages {
                    let request = pb::FetchRequest { settlements, ..request.clone() };
                    let answer = client.fetch(request).await.unwrap().into_inner();
                    assert_eq!((answer.failed, answer.error), (0, None));
                    done.fetch_add(answer.results.len(), Ordering::Relaxed);
                    let acked = |message: pb::Delivery| pb::Settlement {
                        number: 0,
                        token: message.token,
                        action: Some(Action::Ack(pb::AckAction {})),
                    };
                    settlements = answer.messages.into_iter().map(acked).collect();
                }
                if !settlements.is_empty() {
                    let last = pb::SettleRequest { settlements, ..Default::default() };
                    let answer = client.settle(last).await.unwrap().into_inner();
                    assert_eq!(answer.failed, 0);
                    done.fetch_add(answer.results.len(), Ordering::Relaxed);
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        done.load(Ordering::Relaxed)
    })
    .await
}
