//! The command line: what it teaches, and how it says no.

use std::process::{Command, Output};

use testkit::{
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};

use crate::identity::fetches_and_acks;

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fetch-proxy")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn version_is_that_of_the_crate() {
    let output = run(&["--version"]);
    assert_eq!(text(&output.stdout), format!("fetch-proxy {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_names_every_command_with_examples() {
    let help = text(&run(&["--help"]).stdout);
    for word in [
        "serve",
        "dev",
        "probe",
        "keygen",
        "policy",
        "fetch",
        "ack",
        "nak",
        "term",
        "extend",
        "whoami",
        "work",
        "completions",
        "man",
        "Examples:",
    ] {
        assert!(help.contains(word), "{word} is not in:\n{help}");
    }
    assert!(!help.contains("guard"), "guard is for the program itself");
}

/// bash asks the function of the completions, as when a person presses Tab.
#[test]
fn bash_completes_commands_and_flags() {
    let script = text(&run(&["completions", "bash"]).stdout);
    let complete = |words: &[&str]| {
        let (last, words) = (words.len() - 1, words.join(" "));
        let ask = format!("{script}\nCOMP_WORDS=({words}); COMP_CWORD={last}\n");
        let ask = ask
            + "$(complete -p fetch-proxy | sed 's/.*-F \\([^ ]*\\).*/\\1/') fetch-proxy \
               \"${COMP_WORDS[-1]}\" \"${COMP_WORDS[-2]}\"; echo \"${COMPREPLY[@]}\"";
        let output = Command::new("bash").args(["--norc", "-c", &ask]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    };
    assert_eq!(complete(&["fetch-proxy", "wor"]), "work");
    assert_eq!(complete(&["fetch-proxy", "work", "--until"]), "--until-empty");
    assert_eq!(complete(&["fetch-proxy", "dev", "pub"]), "publish");
    assert_eq!(complete(&["fetch-proxy", "guar"]), "");
}

#[test]
fn completions_of_other_shells_name_every_command() {
    for (shell, begins) in [("zsh", "#compdef fetch-proxy"), ("fish", "# Print an optspec")] {
        let script = text(&run(&["completions", shell]).stdout);
        assert!(script.starts_with(begins), "{script}");
        for word in ["serve", "work", "until-empty", "give-back"] {
            assert!(script.contains(word), "{word} is not in:\n{script}");
        }
    }
    assert_eq!(run(&["completions", "tcsh"]).status.code(), Some(2));
}

#[test]
fn man_writes_a_page_for_each_command() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("man1");
    assert!(run(&["man", place.to_str().unwrap()]).status.success());
    for (page, word) in [
        ("fetch-proxy.1", "fetch\\-proxy"),
        ("fetch-proxy-work.1", "until\\-empty"),
        ("fetch-proxy-policy-check.1", "identity"),
        ("fetch-proxy-dev-publish.1", "nats\\-url"),
    ] {
        let page = std::fs::read_to_string(place.join(page)).unwrap();
        assert!(page.contains(".TH ") && page.contains(word), "{word} is not in:\n{page}");
    }
    assert!(!place.join("fetch-proxy-guard.1").exists(), "guard is for the program itself");
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = run(&["man", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: cannot write to "), "{:?}", output.stderr);
}

#[test]
fn help_shows_for_every_flag_its_variable_and_its_default() {
    let help = text(&run(&["serve", "--help"]).stdout);
    for word in [
        "FETCH_PROXY_LISTEN=",
        "127.0.0.1:50051",
        "NATS_URL",
        "NATS_CREDS",
        "--token-key-file",
        "--max-lease",
        "[default: 1h]",
        "--drain-timeout",
        "[default: 20s]",
    ] {
        assert!(help.contains(word), "{word} is not in:\n{help}");
    }
    for secret in ["--nats-password", "--nats-token"] {
        assert!(!help.contains(secret), "{secret} would be seen by everybody");
    }
}

#[test]
fn wrong_flag_ends_with_code_2_and_one_clear_line() {
    for (arguments, said) in [
        (&["serve", "--listen", "nowhere"][..], ":PORT for all addresses"),
        (&["serve", "--token-key-file", "/nowhere/keys"], "cannot read /nowhere/keys"),
        (
            &["serve", "--nats-cert", "/dev/null"],
            "--nats-cert and --nats-key must be given together",
        ),
        (&["serve", "--log-level", "=="], "--log-level"),
        (&["serve", "--log-level", "warning"], "error, warn, info, debug or trace"),
        (&["dev", "--log-level", "infoo"], "`infoo` is not a level"),
        (&["dev", "--samples", "1000001"], "must be a number from 0 to 1000000"),
        (&["dev", "publish", "0"], "must be a number from 1 to 1000000"),
        (&["dev", "--samples", "4", "publish"], "cannot be used with '--samples"),
        (&["serve", "--max-leases", "18446744073709551615"], "from 1 to 100000000"),
        (&["fetch", "S", "c", "--lease", "10"], "such as 500ms, 10s, 5m or 1h"),
        (&["serve", "--drain-timeout", "100000000000y"], "--drain-timeout"),
        (&["probe", "--timeout", "100000000000y"], "--timeout"),
        (&["fetch", "S", "c", "--max-wait", "100000000000y"], "--max-wait"),
        (&["serve", "--nats-url", ""], "a server is missing"),
        (&["serve", "--frobnicate"], "--frobnicate"),
        (&["serve", "--nats-password", "hunter2"], "--nats-password"),
        (&[], "Usage"),
    ] {
        let output = run(arguments);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(said), "{arguments:?}: {stderr}");
    }
}

/// A variable is a flag by another name: what is wrong with one is wrong with the other.
#[test]
fn wrong_variable_ends_with_code_2_and_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let (folder, pipe) = (folder.path().to_str().unwrap(), pipe.to_str().unwrap());
    for (variables, said) in [
        (&[("NATS_URL", "")][..], "a server is missing"),
        (&[("NATS_PASSWORD", "hunter2")], "NATS_PASSWORD is set without a user"),
        (&[("NATS_USER", ""), ("NATS_PASSWORD", "hunter2")], "the name is empty"),
        (&[("NATS_CREDS", folder)], "it is a folder"),
        (&[("NATS_CREDS", pipe)], "it is not a regular file"),
        (&[("NATS_NKEY", pipe)], "it is not a regular file"),
        (&[("NATS_CA", pipe)], "it is not a regular file"),
        (&[("FETCH_PROXY_LOG_LEVEL", "warning")], "error, warn, info, debug or trace"),
        (&[("RUST_LOG", "warning")], "RUST_LOG: `warning` is not a level"),
        (&[("FETCH_PROXY_MAX_LEASES", "18446744073709551615")], "from 1 to 100000000"),
        (&[("FETCH_PROXY_MAX_LEASE", "100000000000y")], "--max-lease"),
        (&[("FETCH_PROXY_PORTS_FILE", folder)], "is a folder"),
        (&[("FETCH_PROXY_CLUSTER", "a b")], "--cluster"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
            .args(["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"])
            .env_remove("RUST_LOG")
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{variables:?}: {stderr}");
        let whole = stderr.contains(said) && !stderr.contains("hunter2");
        assert!(whole, "{variables:?}: {stderr}");
    }
}

#[tokio::test]
async fn largest_numbers_and_times_are_served() {
    let (most, longest) = ("100000000", "366d");
    let counts = ["--max-leases", "--max-waiters", "--max-calls", "--max-connections"];
    let times = [
        "--max-lease",
        "--max-connection-age",
        "--settle-timeout",
        "--drain-delay",
        "--drain-timeout",
    ];
    let flags = counts.iter().flat_map(|flag| [*flag, most]);
    let bytes = ["--max-request-bytes", "--max-answer-bytes"];
    let flags = flags.chain(bytes.iter().flat_map(|flag| [*flag, "1099511627776"]));
    let flags: Vec<&str> = flags.chain(times.iter().flat_map(|flag| [*flag, longest])).collect();
    let fixture = Fixture::new(config()).await;
    fixture.publish("n", "x").await;
    let proxy = Proxy::start(NatsServer::shared(), &flags);
    fetches_and_acks(&proxy, &fixture).await;
    let by_hand = run(&[
        "fetch",
        &fixture.stream,
        &fixture.consumer,
        "--addr",
        &proxy.grpc,
        "--max-wait",
        "366d",
        "-n",
        most,
        "--lease",
        "366d",
    ]);
    assert!(by_hand.status.success(), "{}", text(&by_hand.stderr));
    proxy.signal("TERM");
    testkit::eventually("the drain", || async { proxy.log().contains("draining").then_some(()) })
        .await;
    assert!(!proxy.log().contains("panicked"), "{}", proxy.log());
}

#[test]
fn address_in_use_is_named_and_fails() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(&["serve", "--listen", &address, "--ops-listen", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(&format!("cannot listen on {address}")));
}

#[test]
fn address_where_no_proxy_answers_is_named_with_what_has_happened() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nats = NatsServer::shared().url();
    let nats = nats.rsplit_once('/').unwrap().1;
    for (addr, said) in [
        ("localhost", "the address localhost has no port"),
        (&free.to_string(), "and nothing was sent: tcp connect error: Connection refused"),
        (nats, &format!("{nats} has not answered: ")),
    ] {
        let output = run(&["fetch", "S", "c", "--addr", addr]);
        let stderr = text(&output.stderr);
        assert!(output.status.code() == Some(1) && stderr.contains(said), "{addr}: {stderr}");
    }
}

#[test]
fn keygen_makes_a_new_key_that_serve_accepts() {
    let (one, two) = (text(&run(&["keygen"]).stdout), text(&run(&["keygen"]).stdout));
    assert_ne!(one, two);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("# ours\n{one}{two}")).unwrap();
    let proxy =
        Proxy::start(NatsServer::shared(), &["--token-key-file", file.path().to_str().unwrap()]);
    assert!(!proxy.log().contains("token-key-file"), "it warns, with a file:\n{}", proxy.log());
}

#[tokio::test]
async fn probe_gives_health_by_its_exit_code() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    testkit::eventually("readiness", || async {
        run(&["probe", "--addr", &proxy.ops]).status.success().then_some(())
    })
    .await;
    for addr in [&proxy.ops, &proxy.grpc] {
        let output = run(&["probe", "--addr", addr, "--service", "liveness"]);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "SERVING\n".to_owned()));
    }
    let unknown = run(&["probe", "--addr", &proxy.ops, "--service", "no.such.Service"]);
    assert_eq!(unknown.status.code(), Some(1));
    let mut gone = proxy;
    gone.signal("KILL");
    gone.wait().await;
    let nobody = run(&["probe", "--addr", &gone.ops, "--timeout", "1s"]);
    assert_eq!(nobody.status.code(), Some(1));
    let why = text(&nobody.stderr);
    assert!(why.contains(&gone.ops) && why.contains("Connection refused"), "{why}");
}

/// A Service that has just been made refuses until it has heard of its pods.
#[tokio::test]
async fn probe_repeats_while_no_proxy_listens() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let mut probe = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
        .args(["probe", "--addr", &address, "--service", "liveness", "--timeout", "20s"])
        .spawn()
        .unwrap();
    let proxy = Proxy::start_on(&address, &NatsServer::shared().url(), &[]);
    assert!(probe.wait().unwrap().success(), "{}", proxy.log());
}

/// Container runtimes start programs with few files and allow them more.
#[tokio::test]
async fn file_limit_is_raised_and_a_low_limit_is_logged() {
    for (limit, told) in [("ulimit -Sn 256", false), ("ulimit -n 256", true)] {
        let log = tempfile::NamedTempFile::new().unwrap();
        let serve = format!(
            "{limit} && exec \"$0\" serve \"$@\" --listen 127.0.0.1:0 --ops-listen 127.0.0.1:0"
        );
        let mut child = Command::new("sh")
            .args(["-c", &serve, env!("CARGO_BIN_EXE_fetch-proxy")])
            .args(["--max-connections", "1000", "--nats-url", &NatsServer::shared().url()])
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        let said = testkit::eventually("it to be ready", || async {
            let said = std::fs::read_to_string(log.path()).unwrap();
            said.contains("\"ready\"").then_some(said)
        })
        .await;
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(said.contains("the limit of open files is too low"), told, "{limit}: {said}");
    }
}

#[tokio::test]
async fn name_or_port_alone_is_enough_to_listen() {
    for (listen, addresses) in [
        ("localhost:0", &["127.0.0.1", "localhost"][..]),
        (":0", &["127.0.0.1", "localhost", "0.0.0.0", ""]),
        ("[::]:0", &["127.0.0.1", "localhost", "[::]"]),
    ] {
        let proxy = Proxy::start_on(listen, &NatsServer::shared().url(), &["--insecure"]);
        let (_, port) = proxy.grpc.rsplit_once(':').unwrap();
        for address in addresses {
            let addr = format!("{address}:{port}");
            let output = run(&["probe", "--service", "liveness", "--addr", &addr]);
            assert!(output.status.success(), "{listen}: {addr}: {}", text(&output.stderr));
        }
    }
}
