//! The same figures for Prometheus, by HTTP.
//!
//! Owns: the names of the metrics, which docs/control.md lists, and as much HTTP as a scrape needs. Must never: take
//! anything but `GET /metrics`, or keep a connection open behind its answer.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use thiserror::Error;

use super::protocol::{Figures, PrimaryFigures, Role, Status};
use super::server::Reaction;
use super::state::Monitor;

/// Longest request head.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Most header fields of a request.
const MAX_FIELDS: usize = 64;
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Why there are no metrics.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// The address cannot be listened on.
    #[error(
        "metrics cannot be served on {address}: {source}. Choose an address of this host and a free port with --metrics"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Where Prometheus connects.
#[derive(Debug)]
pub struct MetricsSocket {
    /// Where it connects.
    pub listener: TcpListener,
}

impl MetricsSocket {
    /// Binds `address`.
    pub fn bind(address: SocketAddr) -> Result<Self, MetricsError> {
        let failed = |source| MetricsError::Bind { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener })
    }
}

/// Answers a scrape once its head is whole.
pub(super) fn react(input: &[u8], monitor: &Monitor) -> Reaction {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(input) {
        Ok(httparse::Status::Partial) if input.len() < MAX_HEAD_BYTES => Reaction::Wait,
        Ok(httparse::Status::Complete(_)) => {
            let path = request.path.unwrap_or_default();
            let path = path.split('?').next().unwrap_or_default();
            match (request.method, path) {
                (Some("GET"), "/metrics") => match encode(monitor.status()) {
                    Ok(text) => Reaction::Last(response("200 OK", TEXT, &text)),
                    Err(fmt::Error) => refusal("500 Internal Server Error"),
                },
                (Some("GET"), _) => refusal("404 Not Found"),
                _ => refusal("405 Method Not Allowed"),
            }
        }
        Ok(httparse::Status::Partial) | Err(_) => refusal("400 Bad Request"),
    }
}

fn refusal(status: &str) -> Reaction {
    Reaction::Last(response(
        status,
        "text/plain; charset=utf-8",
        &format!("{status}: ask for GET /metrics\n"),
    ))
}

fn response(status: &str, content: &str, body: &str) -> Vec<u8> {
    let len = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// A status in the text format of Prometheus, version 0.0.4.
fn encode(status: Status) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("vmft");
    registry.register_collector(Box::new(Metrics(status)));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Metrics(Status);

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self(status) = self;
        let mut out = Out(encoder);
        out.identity(status)?;
        out.standing(status)?;
        if let Some(figures) = &status.figures {
            out.figures(figures)?;
            if let Some(primary) = &figures.primary {
                out.primary(primary)?;
            }
        }
        Ok(())
    }
}

struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        gauge.encode(self.0.encode_descriptor(name, help, None, gauge.metric_type())?)
    }

    /// The name gets `_total` behind it.
    fn counter(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        counter.encode(self.0.encode_descriptor(name, help, None, counter.metric_type())?)
    }

    fn identity(&mut self, status: &Status) -> fmt::Result {
        let labels = [
            ("guest", status.name.as_str()),
            ("host", status.host.as_str()),
            ("version", status.version.as_str()),
        ];
        let mut family = self.0.encode_descriptor(
            "info",
            "The guest, this host, this monitor's version",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(1u64).encode(family.encode_family(&labels)?)?;
        self.gauge("uptime_seconds", "For how long this monitor has run", status.uptime_s as f64)
    }

    fn standing(&mut self, status: &Status) -> fmt::Result {
        let mut family =
            self.0.encode_descriptor("role", "1 for what this monitor is", None, MetricType::Gauge)?;
        for role in [Role::None, Role::Primary, Role::Backup, Role::Standby] {
            ConstGauge::new(u64::from(role == status.role))
                .encode(family.encode_family(&[("role", role.name())])?)?;
        }
        self.gauge("view", "The view", status.view as f64)?;
        let protected = f64::from(u8::from(status.protected));
        self.gauge("protected", "1 if the guest would survive the loss of its host", protected)?;
        let help = "When role or protection changed last";
        self.gauge("standing_timestamp_seconds", help, status.since_unix_s as f64)?;
        let transfer = status.transfer.as_ref();
        let under_way = f64::from(u8::from(transfer.is_some()));
        self.gauge("transfer", "1 while the guest is on its way to a backup", under_way)?;
        if let Some(transfer) = transfer {
            let ratio = f64::from(transfer.percent) / 100.0;
            self.gauge("transfer_ratio", "Part of the memory that has been sent or received once", ratio)?;
        }
        Ok(())
    }

    fn figures(&mut self, figures: &Figures) -> fmt::Result {
        let log = &figures.log;
        self.counter("anchors", "The guest's position", figures.anchors as f64)?;
        self.counter(
            "log_bytes",
            "Log sent or received since the backup was given the guest",
            log.bytes as f64,
        )?;
        self.counter("log_batches", "Batches in it", log.batches as f64)?;
        match log.queued_bytes {
            Some(queued) => self.gauge("log_queued_bytes", "Log that is not executed yet", queued as f64),
            None => Ok(()),
        }
    }

    fn primary(&mut self, figures: &PrimaryFigures) -> fmt::Result {
        let ms = |value: u64| value as f64 / 1e3;
        let us = |value: u64| value as f64 / 1e6;
        self.gauge(
            "paused",
            "1 while the guest stands because it was paused",
            f64::from(u8::from(figures.paused)),
        )?;
        self.gauge("lag_seconds", "How long the backup's execution is behind", ms(figures.lag_ms))?;
        let help = "For how long the guest was held up because of the lag";
        self.counter("paced_seconds", help, ms(figures.paced_ms))?;
        self.counter("outputs", "Outputs let out", figures.outputs as f64)?;
        self.gauge("outputs_held", "Outputs that wait for the backup", figures.outputs_held as f64)?;
        let help = "Sum of the times for which outputs have waited";
        self.counter("output_delay_seconds", help, us(figures.output_delay_sum_us))?;
        self.gauge("output_delay_max_seconds", "Longest of them", us(figures.output_delay_max_us))?;
        let help = "Outputs that were acknowledged and had to wait for the lease";
        self.counter("lease_refusals", help, figures.lease_refusals as f64)?;
        self.counter("checkpoints", "Checkpoints", figures.checkpoints as f64)?;
        self.counter("checkpoint_pages", "Pages in them", figures.checkpoint_pages as f64)?;
        let help = "For how long the guest stood still for one, 99th percentile";
        self.gauge("checkpoint_pause_p99_seconds", help, us(figures.checkpoint_pause_p99_us))?;
        let help = "How long an event may wait for the guest's next exit at present";
        self.gauge("deferral_seconds", help, ms(figures.defer_ms))?;
        let help = "Longest time for which no heartbeat of the backup's was answered";
        self.gauge("heartbeat_silence_max_seconds", help, ms(figures.silence_max_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{LogFigures, Transfer};
    use crate::control::state::Identity;

    fn reply(request: &str) -> String {
        let monitor = Monitor::new(Identity { name: "web".into(), ..Identity::default() });
        match react(request.as_bytes(), &monitor) {
            Reaction::Last(bytes) => String::from_utf8(bytes).unwrap(),
            Reaction::Answer(..) => panic!("a connection is kept"),
            Reaction::Wait => "waits".into(),
        }
    }

    #[test]
    fn a_scrape_is_answered_and_all_else_is_refused() {
        let scraped = reply("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            scraped.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4;"),
            "{scraped}"
        );
        assert!(scraped.contains("\nvmft_view 0.0\n"), "{scraped}");
        assert_eq!(reply("GET /metr"), "waits");
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("\u{0}\u{1}\r\n\r\n", "400"),
            (&format!("GET /metrics HTTP/1.1\r\nA: {}", "x".repeat(MAX_HEAD_BYTES)), "400"),
            (&format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_FIELDS + 1)), "400"),
        ] {
            assert!(reply(request).starts_with(&format!("HTTP/1.1 {status} ")), "{request}");
        }
    }

    #[test]
    fn metrics_are_as_documented() {
        let figures = Figures {
            anchors: 1_000,
            log: LogFigures { bytes: 4_096, batches: 8, queued_bytes: Some(3), ..LogFigures::default() },
            primary: Some(PrimaryFigures {
                lag_ms: 2,
                output_delay_sum_us: 1_500,
                ..PrimaryFigures::default()
            }),
        };
        let status = Status {
            name: "web".into(),
            host: "alpha".into(),
            version: "0.1.0+0123456789abcdef".into(),
            uptime_s: 90,
            role: Role::Primary,
            view: 3,
            since_unix_s: 1_700_000_000,
            transfer: Some(Transfer { percent: 25, ..Transfer::default() }),
            figures: Some(figures),
            ..Status::default()
        };
        let text = encode(status).unwrap();
        assert_eq!(text, include_str!("golden/metrics.txt"));
        let documented = include_str!("../../../docs/control.md");
        for name in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
            assert!(documented.contains(&format!("| `{name}`")), "{name} is not documented");
        }
    }
}
