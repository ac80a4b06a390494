//! Which certificates one side of a TLS connection has: what of the files must come together, and what is wrong with a
//! bad one. Pure: the caller reads.

use crate::failure::{ExitCode, Failure};
use std::{
    io,
    path::{Path, PathBuf},
};

/// Reads a file whole: [`std::fs::read`].
pub type Read = fn(&Path) -> io::Result<Vec<u8>>;

/// A certificate chain and its private key, both PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Own certificate first.
    pub cert: Vec<u8>,
    /// PKCS #8, PKCS #1 or SEC 1.
    pub key: Vec<u8>,
}

/// What a client has.
pub struct Client {
    /// Authorities that vouch for the server, PEM.
    pub ca: Vec<u8>,
    /// The own certificate, where the server asks for one.
    pub identity: Option<Identity>,
}

/// What a server has.
pub struct Server {
    /// The own certificate.
    pub identity: Identity,
    /// Authorities that vouch for clients, PEM; `None` if clients need no certificate.
    pub client_ca: Option<Vec<u8>>,
}

/// Files in PEM as flags name them. `None` of everything is a connection without TLS.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// Flag and file of the authorities whose certificates the other side may have.
    pub ca: Option<(&'static str, PathBuf)>,
    /// Flag and file of the own certificate.
    pub cert: Option<(&'static str, PathBuf)>,
    /// Flag and file of its key.
    pub key: Option<(&'static str, PathBuf)>,
}

impl Files {
    /// Authorities that vouch for the server and, where the server asks for one, the own certificate.
    ///
    /// # Errors
    /// A certificate without its key or without authorities, a file that cannot be read or is no PEM of its kind.
    pub fn client(&self, read: Read) -> Result<Option<Client>, Failure> {
        let identity = self.identity(read)?;
        match &self.ca {
            Some(ca) => Ok(Some(Client {
                ca: certificates(ca, read)?,
                identity,
            })),
            None if identity.is_none() => Ok(None),
            None => Err(incomplete(
                "a certificate was given, but no authority that vouches for the server",
            )),
        }
    }

    /// The own certificate and, if clients must show one, the authorities that vouch for theirs.
    ///
    /// # Errors
    /// As [`Files::client`].
    pub fn server(&self, read: Read) -> Result<Option<Server>, Failure> {
        let client_ca = self.ca.as_ref().map(|ca| certificates(ca, read)).transpose()?;
        match self.identity(read)? {
            Some(identity) => Ok(Some(Server { identity, client_ca })),
            None if client_ca.is_none() => Ok(None),
            None => Err(incomplete(
                "authorities for clients were given, but no certificate of the server's own",
            )),
        }
    }

    fn identity(&self, read: Read) -> Result<Option<Identity>, Failure> {
        match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Ok(Some(Identity {
                cert: certificates(cert, read)?,
                key: pem(key, read, "PRIVATE KEY-----", "private key")?,
            })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(incomplete("a certificate was given without its key")),
            (None, Some(_)) => Err(incomplete("a key was given without its certificate")),
        }
    }
}

fn incomplete(message: &str) -> Failure {
    Failure::new(ExitCode::Usage, message).hint("docs/deployment.md shows which files each side needs")
}

fn certificates(file: &(&'static str, PathBuf), read: Read) -> Result<Vec<u8>, Failure> {
    pem(file, read, "-----BEGIN CERTIFICATE-----", "certificate")
}

/// The bytes of a file that has at least one `mark`.
fn pem(
    (flag, path): &(&'static str, PathBuf),
    read: Read,
    mark: &str,
    kind: &str,
) -> Result<Vec<u8>, Failure> {
    let bytes = read(path).map_err(|error| {
        let code = match error.kind() {
            io::ErrorKind::NotFound => ExitCode::NotFound,
            _ => ExitCode::Usage,
        };
        Failure::new(code, format!("{flag} {}: {error}", path.display()))
    })?;
    match bytes.windows(mark.len()).any(|window| window == mark.as_bytes()) {
        true => Ok(bytes),
        false => Err(Failure::new(
            ExitCode::Usage,
            format!("{flag} {}: no PEM {kind} in it", path.display()),
        )
        .hint("PEM is text: -----BEGIN ...; `openssl x509 -in FILE -inform der` makes it of DER")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &Path) -> io::Result<Vec<u8>> {
        match path.to_str() {
            Some("ca" | "cert") => Ok(b"text before\n-----BEGIN CERTIFICATE-----\n".to_vec()),
            Some("key") => Ok(b"-----BEGIN EC PRIVATE KEY-----\n".to_vec()),
            Some("empty") => Ok(Vec::new()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn files(ca: &str, cert: &str, key: &str) -> Files {
        let file = |flag, path: &str| (!path.is_empty()).then(|| (flag, PathBuf::from(path)));
        Files {
            ca: file("--tls-ca", ca),
            cert: file("--tls-cert", cert),
            key: file("--tls-key", key),
        }
    }

    #[test]
    fn each_side_has_what_it_needs_or_nothing() {
        let client = |ca, cert, key| files(ca, cert, key).client(disk).expect("good");
        let server = |ca, cert, key| files(ca, cert, key).server(disk).expect("good");
        assert!(client("", "", "").is_none() && server("", "", "").is_none());
        assert!(client("ca", "", "").is_some_and(|client| client.identity.is_none()));
        let identity = client("ca", "cert", "key").and_then(|client| client.identity);
        assert!(identity.is_some_and(|identity| identity.key == disk(Path::new("key")).expect("key")));
        assert!(server("", "cert", "key").is_some_and(|server| server.client_ca.is_none()));
        assert!(server("ca", "cert", "key").is_some_and(|server| server.client_ca.is_some()));
    }

    #[test]
    fn what_is_missing_or_is_something_else_is_said() {
        let client = |ca, cert, key| files(ca, cert, key).client(disk).map(|_| ()).expect_err("bad");
        let server = |ca, cert, key| files(ca, cert, key).server(disk).map(|_| ()).expect_err("bad");
        assert!(client("", "cert", "key").message.contains("no authority"));
        assert!(client("ca", "cert", "").message.contains("without its key"));
        assert!(server("", "", "key").message.contains("without its certificate"));
        assert!(
            server("ca", "", "")
                .message
                .contains("certificate of the server's own")
        );
        assert_eq!(client("gone", "", "").code, ExitCode::NotFound);
        let swapped = client("ca", "key", "cert");
        assert!(
            swapped.message.contains("--tls-cert key: no PEM certificate"),
            "{swapped}"
        );
        assert!(client("empty", "", "").message.contains("no PEM certificate"));
    }
}
