//! TLS of both sides of the coordinator's API, and towards etcd: flags, and what tonic makes of the files.

use arcface_proto::failure::{ExitCode, Failure};
use arcface_proto::tls::{Client, Files, Identity, Server};
use clap::Args;
use std::{fs, path::PathBuf, time::Duration};
use tonic::transport::{Certificate, ClientTlsConfig, ServerTlsConfig};

/// Longest handshake: whoever connects and says nothing holds no memory for longer.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How a command reaches a coordinator that speaks TLS.
#[derive(Args, Clone, Debug, Default)]
pub struct ClientTls {
    /// Connect with TLS, to coordinators with certificates of these authorities (PEM)
    #[arg(long, value_name = "FILE", env = "ARCFACE_TLS_CA")]
    tls_ca: Option<PathBuf>,
    /// Own certificate (PEM), where the coordinator asks for one
    #[arg(long, value_name = "FILE", env = "ARCFACE_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", env = "ARCFACE_TLS_KEY")]
    tls_key: Option<PathBuf>,
}

impl ClientTls {
    /// `None` without TLS.
    ///
    /// # Errors
    /// Files that do not belong together, cannot be read or are no PEM.
    pub fn config(&self) -> Result<Option<ClientTlsConfig>, Failure> {
        client(Files {
            ca: self.tls_ca.clone().map(|file| ("--tls-ca", file)),
            cert: self.tls_cert.clone().map(|file| ("--tls-cert", file)),
            key: self.tls_key.clone().map(|file| ("--tls-key", file)),
        })
    }
}

/// How a coordinator reaches an etcd that speaks TLS.
#[derive(Args, Clone, Debug, Default)]
pub struct EtcdTls {
    /// Authorities (PEM) of the certificates of etcd, for https addresses in --store
    #[arg(long, value_name = "FILE", env = "ARCFACE_ETCD_CA")]
    etcd_ca: Option<PathBuf>,
    /// Own certificate (PEM), where etcd asks for one
    #[arg(long, value_name = "FILE", env = "ARCFACE_ETCD_CERT")]
    etcd_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", env = "ARCFACE_ETCD_KEY")]
    etcd_key: Option<PathBuf>,
}

impl EtcdTls {
    /// `None` without TLS.
    ///
    /// # Errors
    /// As [`ClientTls::config`].
    pub fn config(&self) -> Result<Option<ClientTlsConfig>, Failure> {
        client(Files {
            ca: self.etcd_ca.clone().map(|file| ("--etcd-ca", file)),
            cert: self.etcd_cert.clone().map(|file| ("--etcd-cert", file)),
            key: self.etcd_key.clone().map(|file| ("--etcd-key", file)),
        })
    }
}

fn client(files: Files) -> Result<Option<ClientTlsConfig>, Failure> {
    let Some(Client { ca, identity }) = files.client(|path| fs::read(path))? else {
        return Ok(None);
    };
    let mut config = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca))
        .timeout(HANDSHAKE);
    if let Some(identity) = identity {
        config = config.identity(pair(identity));
    }
    // What tonic cannot use is found out now, not at some connection.
    match tonic::transport::Endpoint::from_static("https://localhost").tls_config(config.clone()) {
        Ok(_) => Ok(Some(config)),
        Err(error) => Err(unusable(&error)),
    }
}

/// How a coordinator answers.
#[derive(Args, Clone, Debug, Default)]
pub struct ServerTls {
    /// Serve gRPC with TLS: the coordinator's certificate chain (PEM), for the names by which others reach it
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Admit only workers and clients with certificates of these authorities (PEM)
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
}

/// TLS of a server, and whom it admits.
#[derive(Clone, Debug)]
pub struct Served {
    /// What tonic serves with.
    pub config: ServerTlsConfig,
    /// Clients must show a certificate.
    pub authenticated: bool,
}

impl ServerTls {
    /// `None` without TLS.
    ///
    /// # Errors
    /// As [`ClientTls::config`].
    pub fn config(&self) -> Result<Option<Served>, Failure> {
        let files = Files {
            ca: self.tls_client_ca.clone().map(|file| ("--tls-client-ca", file)),
            cert: self.tls_cert.clone().map(|file| ("--tls-cert", file)),
            key: self.tls_key.clone().map(|file| ("--tls-key", file)),
        };
        let Some(Server { identity, client_ca }) = files.server(|path| fs::read(path))? else {
            return Ok(None);
        };
        let mut config = ServerTlsConfig::new().identity(pair(identity)).timeout(HANDSHAKE);
        let authenticated = client_ca.is_some();
        if let Some(ca) = client_ca {
            config = config.client_ca_root(Certificate::from_pem(ca));
        }
        match tonic::transport::Server::builder().tls_config(config.clone()) {
            Ok(_) => Ok(Some(Served {
                config,
                authenticated,
            })),
            Err(error) => Err(unusable(&error)),
        }
    }
}

fn pair(identity: Identity) -> tonic::transport::Identity {
    tonic::transport::Identity::from_pem(identity.cert, identity.key)
}

fn unusable(error: &tonic::transport::Error) -> Failure {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    Failure::new(ExitCode::Usage, format!("TLS: {cause}"))
        .hint("does the key belong to the certificate, and are both PEM?")
}
