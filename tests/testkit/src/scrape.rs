//! A scraper: reads the page of metrics of a replica, and its series.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::TcpStream,
};

use crate::eventually;

/// The header `Accept` of Prometheus 3.
pub const PROMETHEUS: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
     application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";

/// One page of metrics, in the text format.
#[derive(Debug, Clone, Default)]
pub struct Scrape {
    /// The families, each with its type, in the order of the page.
    pub types: Vec<(String, String)>,
    /// The values, by the name with its labels as the page has them.
    pub series: BTreeMap<String, f64>,
}

/// Waits until the books of a replica balance, which they do within a moment, and returns them.
///
/// # Panics
/// They never do.
pub async fn balanced(address: &str) -> Books {
    eventually("balanced books", || async { Scrape::of(address).books().ok() }).await
}

/// Leases that began, that ended, and that are held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Books {
    pub began: u64,
    pub ended: u64,
    pub held: u64,
}

/// An answer over HTTP/1.1.
#[derive(Debug)]
pub struct Page {
    pub status: u16,
    /// In lower case, with their values.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// Gets a page with these headers.
pub fn get(address: &str, path: &str, headers: &[(&str, &str)]) -> Page {
    let headers: String =
        headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n"))
}

/// Asks for a page as a browser does that was given this host.
pub fn visit(address: &str, method: &str, path: &str, host: &str) -> Page {
    ask(address, &format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
}

fn ask(address: &str, request: &str) -> Page {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    Page { status, headers, body: answer[end + 4..].to_vec() }
}

impl Scrape {
    /// Scrapes the replica whose ops port is at `address`.
    pub fn of(address: &str) -> Self {
        let page = get(address, "/metrics", &[]);
        assert_eq!(page.status, 200, "{}", String::from_utf8_lossy(&page.body));
        Self::read(&String::from_utf8(page.body).unwrap())
    }

    /// Reads a page. No series may stand twice.
    pub fn read(page: &str) -> Self {
        let mut scrape = Self::default();
        for line in page.lines() {
            if let Some(family) = line.strip_prefix("# TYPE ") {
                let (name, kind) = family.split_once(' ').unwrap();
                scrape.types.push((name.to_owned(), kind.to_owned()));
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let before = scrape.series.insert(series.to_owned(), value.parse().unwrap());
                assert_eq!(before, None, "{series} stands twice");
            }
        }
        scrape
    }

    /// The value of one series, by its name and labels.
    pub fn value(&self, series: &str) -> f64 {
        *self.series.get(series).unwrap_or_else(|| panic!("there is no {series}"))
    }

    /// The sum of the series of `family` that have all these labels, each written as on the page.
    pub fn sum(&self, family: &str, labels: &[&str]) -> f64 {
        self.of_family(family)
            .filter(|(name, _)| labels.iter().all(|label| name.contains(label)))
            .map(|(_, value)| value)
            .sum()
    }

    /// The books of the leases of each consumer: granted and adopted, ended and held. They must be equal.
    ///
    /// # Errors
    /// The consumer whose books do not balance.
    pub fn books(&self) -> Result<Books, String> {
        let mut all = BTreeMap::<String, Books>::new();
        for (family, side) in [
            ("fetchproxy_leases_granted_total", 0),
            ("fetchproxy_leases_adopted_total", 0),
            ("fetchproxy_leases_ended_total", 1),
            ("fetchproxy_leases", 2),
        ] {
            for (series, value) in self.of_family(family) {
                let labels = series.split_once('{').map_or("", |(_, labels)| labels);
                let consumer = labels.split(",how=").next().unwrap().trim_end_matches('}');
                let books = all.entry(consumer.to_owned()).or_default();
                let side =
                    [&mut books.began, &mut books.ended, &mut books.held].into_iter().nth(side);
                *side.unwrap() += value as u64;
            }
        }
        let mut sum = Books::default();
        for (consumer, Books { began, ended, held }) in all {
            if began != ended + held {
                return Err(format!("{consumer}: {began} began, {ended} ended, {held} are held"));
            }
            sum.began += began;
            sum.ended += ended;
            sum.held += held;
        }
        Ok(sum)
    }

    /// The series of a family. Those of a histogram are its buckets, its sum and its count.
    pub fn of_family<'a>(&'a self, family: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        self.series.iter().filter_map(move |(series, value)| {
            let name = series.split('{').next().unwrap();
            let rest = name.strip_prefix(family)?;
            matches!(rest, "" | "_bucket" | "_sum" | "_count").then_some((&**series, *value))
        })
    }
}
