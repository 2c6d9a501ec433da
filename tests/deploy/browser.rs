//! A browser without a window, by the DevTools protocol over a pipe. It reaches this machine alone.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;

/// No step takes longer, on a busy machine as well.
const LONGEST: Duration = Duration::from_secs(60);

/// A browser with one window.
pub struct Browser {
    process: Child,
    commands: File,
    heard: Receiver<Value>,
    session: String,
    last: u64,
    /// The complaints of the browser since the start: on its console, and about rules that a page breaks.
    pub complaints: Vec<String>,
    _folder: TempDir,
}

impl Browser {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let pipes = Command::new("mkfifo").args([path("commands"), path("answers")]).status();
        assert!(pipes.unwrap().success());
        let browser = std::env::var("FETCH_PROXY_TEST_CHROMIUM")
            .expect("FETCH_PROXY_TEST_CHROMIUM is not set: run `make test-deploy`");
        // The browser reads commands from the file 3, and writes answers to the file 4.
        let process = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<commands 4>answers"])
            .arg(format!("{browser}/run"))
            .args(["--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update"])
            .arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
            .arg(format!("--user-data-dir={}", path("profile").display()))
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let commands = OpenOptions::new().write(true).open(path("commands")).unwrap();
        let answers = BufReader::new(File::open(path("answers")).unwrap());
        let (sender, heard) = mpsc::channel();
        thread::spawn(move || {
            for message in answers.split(0).map_while(Result::ok) {
                let _ = sender.send(serde_json::from_slice(&message).unwrap());
            }
        });
        let (session, complaints) = (String::new(), Vec::new());
        let mut browser =
            Self { process, commands, heard, session, last: 0, complaints, _folder: folder };
        let window = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": window["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach);
        attached["sessionId"].as_str().unwrap().clone_into(&mut browser.session);
        for domain in ["Page", "Runtime", "Log", "Audits"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Opens a page in a window of this size, in this colour scheme.
    pub fn open(&mut self, url: &str, (width, height): (u32, u32), scheme: &str) {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size);
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
        let navigated = self.call("Page.navigate", json!({ "url": url }));
        assert!(navigated.get("errorText").is_none(), "{navigated}");
        while self.hear()["method"] != "Page.loadEventFired" {}
    }

    /// The value of an expression on the page.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let question = json!({ "expression": expression, "returnByValue": true });
        let answer = self.call("Runtime.evaluate", question);
        assert!(answer.get("exceptionDetails").is_none(), "{answer}");
        answer["result"]["value"].clone()
    }

    /// A picture of the whole page, as PNG.
    pub fn picture(&mut self) -> Vec<u8> {
        let picture = self.call("Page.captureScreenshot", json!({ "captureBeyondViewport": true }));
        STANDARD.decode(picture["data"].as_str().unwrap()).unwrap()
    }

    /// Hears all that the browser has said about the page so far.
    pub fn settle(&mut self) {
        // An answer comes after the events before it, of which some are sent a moment later.
        for _ in 0..3 {
            self.evaluate("1");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last += 1;
        let mut command = json!({ "id": self.last, "method": method, "params": parameters });
        if !self.session.is_empty() {
            command["sessionId"] = self.session.clone().into();
        }
        self.commands.write_all(format!("{command}\0").as_bytes()).unwrap();
        loop {
            let mut heard = self.hear();
            if heard["id"] == self.last {
                assert!(heard.get("error").is_none(), "{method}: {heard}");
                return heard["result"].take();
            }
        }
    }

    fn hear(&mut self) -> Value {
        let heard = self.heard.recv_timeout(LONGEST).expect("the browser says nothing");
        let complaints = [
            "Log.entryAdded",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Audits.issueAdded",
        ];
        if complaints.iter().any(|complaint| heard["method"] == *complaint) {
            self.complaints.push(heard["params"].to_string());
        }
        heard
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
