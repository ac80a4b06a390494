//! The certificates of a test: an authority, what it has signed for 127.0.0.1, and what another authority has.

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// PEM files in a folder of their own.
pub struct Certificates {
    folder: tempfile::TempDir,
}

impl Certificates {
    /// Signs for the server, for one client, and for a stranger: his authority is none of ours.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn make() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        authority(folder.path(), "ca", &["server", "client"])?;
        authority(folder.path(), "other-ca", &["stranger"])?;
        Ok(Self { folder })
    }

    /// The certificate of an authority, `ca` or `other-ca`, or of who was signed for.
    pub fn cert(&self, name: &str) -> PathBuf {
        self.folder.path().join(name).with_extension("pem")
    }

    /// The key of who was signed for.
    pub fn key(&self, name: &str) -> PathBuf {
        self.folder.path().join(name).with_extension("key")
    }

    /// What a worker or a client needs to be `name` and to trust our authority.
    pub fn environment(&self, name: &str) -> Vec<(String, String)> {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        vec![
            ("ARCFACE_TLS_CA".into(), text(self.cert("ca"))),
            ("ARCFACE_TLS_CERT".into(), text(self.cert(name))),
            ("ARCFACE_TLS_KEY".into(), text(self.key(name))),
        ]
    }
}

fn authority(folder: &Path, name: &str, members: &[&str]) -> Result<()> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate()?;
    let own = params.self_signed(&key)?;
    fs::write(folder.join(name).with_extension("pem"), own.pem())?;
    let issuer = Issuer::new(params, key);
    for member in members {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, *member);
        let key = KeyPair::generate()?;
        let signed = params.signed_by(&key, &issuer)?;
        fs::write(folder.join(member).with_extension("pem"), signed.pem())?;
        fs::write(folder.join(member).with_extension("key"), key.serialize_pem())?;
    }
    Ok(())
}
