//! The page for people in a real browser: light, dark, and on a small telephone.

use std::{fs, path::Path};

use fetch_proxy::pb::FetchRequest;
use serde_json::Value;
use testkit::{
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, fetch, take},
};

use crate::browser::Browser;

/// The texts whose contrast to what is behind them is below 4.5 (WCAG 2.2, success criterion 1.4.3).
const FAINT: &str = r#"
(() => {
  const channels = (color) => color.match(/[\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const words = (element) => [...element.childNodes]
    .filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.data.trim()).join("");
  const all = [...document.body.querySelectorAll("*")].filter(words).map((element) => {
    const [one, other] = [light(getComputedStyle(element).color), light(behind(element))].sort();
    const [dark, bright] = one < other ? [one, other] : [other, one];
    return [words(element), (bright + 0.05) / (dark + 0.05)];
  });
  return { seen: all.length, faint: all.filter(([, ratio]) => ratio < 4.5) };
})()
"#;

/// The elements that reach beyond the right edge of the window.
const BEYOND: &str = "[...document.querySelectorAll('body *')]
  .filter((one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map((one) => one.outerHTML.slice(0, 200))";

#[tokio::test(flavor = "multi_thread")]
async fn page_is_readable_in_a_browser_in_each_scheme_and_on_a_telephone() {
    let fixture = Fixture::new(config()).await;
    let name = "fetch-proxy-7d9c5b8f6d-x2x8k.a-cluster-with-a-long-name.example";
    let proxy = Proxy::start(NatsServer::shared(), &["--replica-name", name]);
    proxy.ready().await;
    fixture.publish_many(30).await;
    let client = proxy.client().await;
    // The longest name of a worker that is kept, without a place to break it.
    for worker in ["w".repeat(64), "<script>alert(1)</script>".to_owned()] {
        let request = FetchRequest { worker, ..fetch(&fixture, 12, 0) };
        take(&client, request).await;
    }
    let unknown = FetchRequest { consumer: "n".repeat(100), ..fetch(&fixture, 1, 0) };
    client.clone().fetch(unknown).await.unwrap_err();

    let pictures = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
    fs::create_dir_all(&pictures).unwrap();
    let url = format!("http://{}/", proxy.ops);
    tokio::task::spawn_blocking(move || {
        let mut browser = Browser::start();
        for (picture, width, scheme) in [
            ("light", 1280, "light"),
            ("dark", 1280, "dark"),
            ("laptop", 1140, "light"),
            ("tablet", 960, "light"),
            ("telephone", 360, "light"),
            ("telephone-dark", 360, "dark"),
        ] {
            browser.open(&url, (width, 800), scheme);
            let wide = browser.evaluate("document.documentElement.scrollWidth");
            assert!(wide.as_u64().unwrap() <= width.into(), "{picture}: {wide} wide");
            let beyond = browser.evaluate(BEYOND);
            assert_eq!(beyond, Value::Array(Vec::new()), "{picture}");
            let contrast = browser.evaluate(FAINT);
            assert!(contrast["seen"].as_u64().unwrap() > 100, "{contrast}");
            assert_eq!(contrast["faint"], Value::Array(Vec::new()), "{picture}");
            let dark = browser.evaluate("getComputedStyle(document.body).backgroundColor");
            assert_eq!(dark == "rgb(13, 17, 23)", scheme == "dark", "{picture}: {dark}");
            fs::write(pictures.join(format!("{picture}.png")), browser.picture()).unwrap();
        }
        let scripts = browser.evaluate("document.scripts.length");
        assert_eq!(scripts, 0, "a name has become a script");
        browser.settle();
        assert_eq!(browser.complaints, [""; 0]);

        // The browser would complain: the page may not load anything.
        browser.evaluate("document.body.append(Object.assign(new Image(), { src: '/livez' }))");
        browser.evaluate("document.body.setAttribute('style', 'color: red')");
        browser.settle();
        assert!(browser.complaints.len() > 1, "{:?}", browser.complaints);
        assert!(browser.complaints.iter().any(|said| said.contains("Content Security Policy")));
    })
    .await
    .unwrap();
}
