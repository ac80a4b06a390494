//! The HTTP side of a coordinator: the status page's files and JSON, what is refused, and what browsers are told about it.

mod fakes;

use fakes::{Cluster, spec, training, within};
use serde_json::Value;
use std::collections::BTreeMap;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        assert_eq!(self.headers["content-type"], "application/json");
        serde_json::from_str(&self.body).expect("JSON")
    }
}

async fn ask_with(cluster: &Cluster, method: &str, path: &str, more: &str) -> Answer {
    let address = cluster.running.metrics.expect("an address");
    let exchange = async {
        let mut socket = TcpStream::connect(address).await.expect("connect");
        let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n");
        socket.write_all(request.as_bytes()).await.expect("ask");
        let mut text = String::new();
        socket.read_to_string(&mut text).await.expect("read");
        text
    };
    let text = within(path, exchange).await;
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1));
    Answer {
        status: status.and_then(|status| status.parse().ok()).expect("a status"),
        headers: lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect(),
        body: body.to_owned(),
    }
}

async fn ask(cluster: &Cluster, path: &str) -> Answer {
    ask_with(cluster, "GET", path, "").await
}

async fn json(cluster: &Cluster, path: &str) -> Value {
    let answer = ask(cluster, path).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    answer.json()
}

#[tokio::test]
async fn a_page_is_read_only_and_comes_with_a_strict_policy() {
    let cluster = Cluster::start().await;
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/page/app.js", "text/javascript; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("/api/v1/cluster", "application/json"),
    ] {
        let whole = ask(&cluster, path).await;
        assert_eq!(
            (whole.status, whole.headers["content-type"].as_str()),
            (200, kind),
            "{path}"
        );
        let policy = &whole.headers["content-security-policy"];
        assert!(
            policy.starts_with("default-src 'none'; script-src 'self';"),
            "{policy}"
        );
        assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
        assert_eq!(whole.headers["x-content-type-options"], "nosniff");
        assert_eq!(whole.headers["cache-control"], "no-cache, private");
        let head = ask_with(&cluster, "HEAD", path, "").await;
        assert_eq!((head.status, head.body.as_str()), (200, ""), "{path}");
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            let refused = ask_with(&cluster, method, path, "content-length: 0\r\n").await;
            assert_eq!(refused.status, 405, "{method} {path}");
            assert_eq!(refused.headers["allow"], "GET,HEAD", "{method} {path}");
        }
    }
    for path in [
        "/nothing",
        "/page/",
        "/page/../index.html",
        "/api/v1/",
        "/api/v1/jobs/a/b",
    ] {
        let missing = ask(&cluster, path).await;
        assert_eq!(missing.status, 404, "{path}");
        assert!(missing.body.contains("/metrics"), "{}", missing.body);
    }
    let file = ask(&cluster, "/page/app.js").await;
    let tag = format!("if-none-match: {}\r\n", file.headers["etag"]);
    let again = ask_with(&cluster, "GET", "/page/app.js", &tag).await;
    assert_eq!((again.status, again.body.as_str()), (304, ""));
}

#[tokio::test]
async fn cookies_of_other_services_do_no_harm_and_what_is_no_http_is_turned_away() {
    let cluster = Cluster::start().await;
    let cookies = format!("cookie: {}\r\n", "x".repeat(8 << 10));
    assert_eq!(ask_with(&cluster, "GET", "/", &cookies).await.status, 200);
    assert_eq!(ask_with(&cluster, "\u{16}\u{3}\u{1}", "/", "").await.status, 400);
}

#[tokio::test]
async fn jobs_come_in_pages_newest_first() {
    let cluster = Cluster::start().await;
    let mut submitted = Vec::new();
    for _ in 0..5 {
        submitted.push(cluster.submit(spec(2)).await);
    }
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let page = json(&cluster, &format!("/api/v1/jobs?limit=2&state=live{after}")).await;
        let jobs = page["jobs"].as_array().expect("a list");
        assert!(jobs.len() <= 2);
        for job in jobs {
            assert_eq!(job["state"], "queued");
            assert!(job.get("spec").is_none(), "a long list has no room for it");
            seen.push(job["id"].as_str().expect("an id").to_owned());
        }
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    seen.sort();
    submitted.sort();
    assert_eq!(seen, submitted, "each once");
    for wrong in ["limit=0", "limit=1000", "state=dead", "after=x", "order=up"] {
        assert_eq!(
            ask(&cluster, &format!("/api/v1/jobs?{wrong}")).await.status,
            400,
            "{wrong}"
        );
    }
    let missing = ask(&cluster, "/api/v1/jobs/job-000000000000").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.json()["error"], "there is no job job-000000000000");
}

#[tokio::test]
async fn a_job_shows_its_ranks_its_curve_and_that_its_history_has_changed() {
    let cluster = Cluster::start().await;
    let (id, _a, _b, zero, _one) = training(&cluster, spec(2)).await;
    let path = format!("/api/v1/jobs/{id}");
    let before = json(&cluster, &path).await;
    let ranks = before["ranks"].as_array().expect("ranks");
    assert_eq!(ranks.len(), 2);
    for (number, rank) in ranks.iter().enumerate() {
        assert_eq!(rank["rank"], number);
        assert_eq!(rank["pid"], 100 + number);
        assert_eq!(rank["state"], "training", "{rank}");
    }
    for step in [10, 20, 30] {
        zero.metrics(step).await;
    }
    cluster
        .job_when(&id, "to have trained", |job| job.step == 30)
        .await;
    let curve = within("the curve", async {
        loop {
            let curve = json(&cluster, &format!("{path}/curve")).await;
            if curve["step"].as_array().is_some_and(|steps| steps.len() == 3) {
                return curve;
            }
        }
    })
    .await;
    assert_eq!(curve["first_step"], 10);
    assert_eq!(curve["step"], serde_json::json!([10, 20, 30]));
    assert!(
        curve["loss"][2].is_number() && curve["samples_per_second"][2].is_number(),
        "{curve}"
    );
    let listed = json(&cluster, &format!("{path}/evaluations")).await;
    assert_eq!(listed["evaluations"], serde_json::json!([]));
    let nodes = json(&cluster, "/api/v1/nodes?limit=1").await;
    let next = nodes["next"].as_str().expect("there is another");
    let rest = json(&cluster, &format!("/api/v1/nodes?after={next}")).await;
    assert_eq!(rest["nodes"].as_array().map(Vec::len), Some(1));
    let totals = json(&cluster, "/api/v1/cluster").await;
    assert_eq!(
        (&totals["leads"], &totals["jobs_active"]),
        (&Value::from(true), &Value::from(1))
    );
}
