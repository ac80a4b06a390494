//! An etcd server of its own for a test: one member on free ports of loopback, its data in a scratch directory,
//! killed when it is dropped. The coordinator's own tests include this file, so it needs the standard library alone.

use anyhow::{Context, Result, bail};
use std::{
    env,
    ffi::OsString,
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// For a server to come up on a machine that compiles beside it.
const START: Duration = Duration::from_secs(30);
/// Between two looks.
const POLL: Duration = Duration::from_millis(20);

/// A server that runs, or has been stopped for a while.
pub struct Etcd {
    scratch: tempfile::TempDir,
    client: SocketAddr,
    peer: SocketAddr,
    /// Where it is asked for its health, also when clients must speak TLS.
    health: SocketAddr,
    scheme: &'static str,
    /// Arguments beside the usual ones.
    more: Vec<OsString>,
    server: Option<Child>,
}

impl Etcd {
    /// Starts a server and waits until it is healthy. `None` where no etcd is installed, which is said on standard
    /// error; in CI that is an error.
    ///
    /// # Errors
    /// If it does not come up, or is missing in CI.
    pub fn start() -> Result<Option<Self>> {
        Self::start_with("http", Vec::new())
    }

    /// The same with the scheme of its clients' URL and further arguments.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(scheme: &'static str, more: Vec<OsString>) -> Result<Option<Self>> {
        let missing = "no etcd server is installed (apt: etcd-server, or run scripts/setup.sh)";
        if Command::new("etcd")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_err()
        {
            if env::var_os("CI").is_some() {
                bail!("{missing}");
            }
            eprintln!("SKIPPED: {missing}");
            return Ok(None);
        }
        let mut etcd = Self {
            scratch: tempfile::tempdir()?,
            client: free_port()?,
            peer: free_port()?,
            health: free_port()?,
            scheme,
            more,
            server: None,
        };
        etcd.resume()?;
        Ok(Some(etcd))
    }

    /// Where clients find it: `http://HOST:PORT`, or https.
    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.client)
    }

    /// Kills it at once; its data stays.
    ///
    /// # Errors
    /// If the system cannot say that it has ended.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut server) = self.server.take() {
            server.kill().context("kill etcd")?;
            server.wait().context("wait for etcd to end")?;
        }
        Ok(())
    }

    /// Starts it again on its old ports and data, and waits until it is healthy.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn resume(&mut self) -> Result<()> {
        let (client, peer) = (self.url(), format!("http://{}", self.peer));
        let log = self.scratch.path().join("log");
        let sink = File::options().create(true).append(true).open(&log)?;
        let server = Command::new("etcd")
            .args(&self.more)
            .arg("--data-dir")
            .arg(self.scratch.path().join("data"))
            .args(["--name", "test", "--logger", "zap"])
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--listen-metrics-urls", &format!("http://{}", self.health)])
            .args(["--initial-cluster", &format!("test={peer}")])
            .stdin(Stdio::null())
            .stdout(sink.try_clone()?)
            .stderr(sink)
            .spawn()
            .context("start etcd")?;
        self.server = Some(server);
        let start = Instant::now();
        while !is_healthy(self.health) {
            let ended = self.server.as_mut().map(Child::try_wait).transpose()?.flatten();
            if ended.is_some() || start.elapsed() > START {
                bail!("etcd does not come up ({ended:?}): {}", text_of(&log));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // An error means that it has ended, which is what is wanted.
        let _ended = self.kill();
    }
}

fn text_of(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_else(|error| format!("(no log: {error})"))
}

/// A port that was free a moment ago, for a server that cannot be told to choose one and say which.
///
/// # Errors
/// If there is none.
pub fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn is_healthy(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut socket = TcpStream::connect_timeout(&address, START)?;
        socket.set_read_timeout(Some(START))?;
        socket.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains("\"health\":\"true\""))
}
