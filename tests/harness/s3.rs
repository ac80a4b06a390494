//! A server with the protocol of S3 for a test: on a free port of loopback, with a key that it asks for, its objects as
//! files of a scratch directory, over HTTP or over TLS with an authority of its own. The worker's own tests include this file.

use anyhow::{Context, Result};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use s3s_fs::FileSystem;
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{self, ServerConfig, pki_types::PrivateKeyDer},
};

/// Name of its one bucket.
pub const BUCKET: &str = "faces";
/// What a client signs with.
pub const KEY: (&str, &str) = ("test-key", "test-secret");

/// A server that runs, or has been stopped for a while.
pub struct S3 {
    scratch: tempfile::TempDir,
    address: SocketAddr,
    tls: Option<TlsAcceptor>,
    runtime: Option<Runtime>,
}

impl S3 {
    /// Starts a server with an empty bucket.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start() -> Result<Self> {
        Self::with(tempfile::tempdir()?, None)
    }

    /// The same over TLS; who is to trust it finds its authority by [`Self::environment`].
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_tls() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let signed = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
        fs::write(authority(scratch.path()), signed.cert.pem())?;
        let key = PrivateKeyDer::Pkcs8(signed.signing_key.serialize_der().into());
        let provider = rustls::crypto::ring::default_provider();
        let config = ServerConfig::builder_with_provider(provider.into())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key)?;
        Self::with(scratch, Some(TlsAcceptor::from(Arc::new(config))))
    }

    fn with(scratch: tempfile::TempDir, tls: Option<TlsAcceptor>) -> Result<Self> {
        let mut server = Self {
            scratch,
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            tls,
            runtime: None,
        };
        fs::create_dir(server.bucket())?;
        server.resume()?;
        Ok(server)
    }

    /// Where clients find it.
    pub fn endpoint(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// What a worker is started with to find it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let (key, secret) = KEY;
        let (endpoint, trusted) = (self.endpoint(), authority(self.scratch.path()));
        let how = match self.tls {
            Some(_) => ("SSL_CERT_FILE", trusted.to_str().unwrap_or_default()),
            None => ("AWS_ALLOW_HTTP", "true"),
        };
        [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            how,
            ("AWS_ACCESS_KEY_ID", key),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("NO_PROXY", "127.0.0.1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }

    /// The folder that holds the objects of the bucket, by their names.
    pub fn bucket(&self) -> PathBuf {
        self.scratch.path().join(BUCKET)
    }

    /// Ends it; its objects stay. Connections are refused then.
    pub fn stop(&mut self) {
        self.runtime = None;
    }

    /// Starts it again, on its old port.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn resume(&mut self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let listener = runtime
            .block_on(TcpListener::bind(self.address))
            .with_context(|| format!("listen at {}", self.address))?;
        self.address = listener.local_addr()?;
        let root = self.scratch.path().to_owned();
        runtime.spawn(serve(listener, root, self.tls.clone()));
        self.runtime = Some(runtime);
        Ok(())
    }
}

/// The file of the authority that a server in this directory is known by.
fn authority(scratch: &Path) -> PathBuf {
    scratch.join("authority.pem")
}

async fn serve(listener: TcpListener, root: PathBuf, tls: Option<TlsAcceptor>) {
    let files = FileSystem::new(root).expect("the folder is there");
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(SimpleAuth::from_single(KEY.0, KEY.1));
    let service = builder.build();
    // The end of the runtime ends all of it.
    while let Ok((socket, _)) = listener.accept().await {
        let (service, tls) = (service.clone(), tls.clone());
        tokio::spawn(async move {
            let connection = Builder::new(TokioExecutor::new());
            // A client that leaves, or does not trust it, is no error of the server.
            match tls {
                None => drop(connection.serve_connection(TokioIo::new(socket), service).await),
                Some(tls) => {
                    let Ok(socket) = tls.accept(socket).await else {
                        return;
                    };
                    drop(connection.serve_connection(TokioIo::new(socket), service).await);
                }
            }
        });
    }
}
