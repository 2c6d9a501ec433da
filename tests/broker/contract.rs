//! The contract of a broker: one suite for the scripted broker, the model of the simulation, and a real
//! nats-server. If two differ, the real server is right.
//!
//! Each promise names its brokers. The scripted broker holds the promises that the lessor is tested with.
//! An operator cannot reach it, so promises about an operator's work name the other two.

/// Each promise, on all brokers that it names.
macro_rules! contract {
    ($(
        $(#[$meta:meta])*
        $name:ident($world:ident: $bound:ident) on $($broker:ident),+ $promise:block
    )*) => {$(
        $(#[$meta])*
        async fn $name<W: $bound>($world: W) $promise

        mod $name {
            $(contract!(@ $broker $name);)+
        }
    )*};
    (@ fake $name:ident) => {
        #[tokio::test]
        async fn on_the_fake() {
            super::$name(super::super::worlds::fake().await).await;
        }
    };
    (@ model $name:ident) => {
        #[tokio::test(start_paused = true)]
        async fn on_the_model() {
            super::$name(super::super::worlds::modelled().await).await;
        }
    };
    (@ real $name:ident) => {
        #[tokio::test]
        async fn on_the_real_one() {
            super::$name(super::super::worlds::real().await).await;
        }
    };
}

mod again;
mod client;
mod clustered;
mod limits;
mod operating;
mod pulling;
mod restarted;
mod settling;
mod stale;
mod stored;
mod streams;
mod unreadable;
mod worlds;
