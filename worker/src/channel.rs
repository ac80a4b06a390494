//! How a coordinator is connected to: plain, or with TLS. Which one, and when, is `dial`'s.

use arcface_proto::failure::Failure;
use arcface_proto::tls::{Client, Files};
use clap::Args;
use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// A silent connection is asked this often whether the other end lives, and given up after as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Files for connections with TLS. They are read for every connection, so renewed certificates need no restart.
#[derive(Args, Clone, Debug, Default)]
pub struct ClientTls {
    /// Connect with TLS, to coordinators with certificates of these authorities (PEM).
    #[arg(long, value_name = "FILE", env = "ARCFACE_TLS_CA")]
    tls_ca: Option<PathBuf>,
    /// Own certificate (PEM), where the coordinator asks for one.
    #[arg(long, value_name = "FILE", env = "ARCFACE_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, value_name = "FILE", env = "ARCFACE_TLS_KEY")]
    tls_key: Option<PathBuf>,
}

impl ClientTls {
    /// The same flags for another process of this executable.
    pub fn arguments(&self) -> Vec<OsString> {
        let flags = [
            ("--tls-ca", &self.tls_ca),
            ("--tls-cert", &self.tls_cert),
            ("--tls-key", &self.tls_key),
        ];
        flags
            .into_iter()
            .filter_map(|(flag, file)| Some([flag.into(), file.clone()?.into_os_string()]))
            .flatten()
            .collect()
    }

    /// Reads and checks the files; `None` without TLS.
    ///
    /// # Errors
    /// Files that do not belong together, cannot be read or are no PEM.
    pub fn config(&self) -> Result<Option<ClientTlsConfig>, Failure> {
        let files = Files {
            ca: self.tls_ca.clone().map(|file| ("--tls-ca", file)),
            cert: self.tls_cert.clone().map(|file| ("--tls-cert", file)),
            key: self.tls_key.clone().map(|file| ("--tls-key", file)),
        };
        let Some(Client { ca, identity }) = files.client(|path| std::fs::read(path))? else {
            return Ok(None);
        };
        let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
        Ok(Some(match identity {
            Some(own) => config.identity(Identity::from_pem(own.cert, own.key)),
            None => config,
        }))
    }

    /// Connects to `HOST:PORT`, within `limit`.
    ///
    /// # Errors
    /// Why not, in a few words.
    pub async fn connect(&self, address: &str, limit: Duration) -> Result<Channel, String> {
        let tls = self.config().map_err(|failure| failure.message)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(|error| root_cause(&error))?
            .connect_timeout(limit)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        if let Some(tls) = tls {
            endpoint = endpoint
                .tls_config(tls.timeout(limit))
                .map_err(|error| format!("TLS: {}", root_cause(&error)))?;
        }
        endpoint.connect().await.map_err(|error| root_cause(&error))
    }
}

fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
