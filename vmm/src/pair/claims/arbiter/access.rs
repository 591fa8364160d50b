//! How an etcd is asked: in the open or by TLS, as nobody or as one of its users.
//!
//! Owns: reading the files that the options `--etcd-...` name. Must never: show a password, or have one sent in the open.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use thiserror::Error;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use crate::host::{SecretError, read_secret};

/// More than any of the files has.
const MAX_FILE_BYTES: usize = 256 << 10;

/// Why the options do not say how.
#[derive(Debug, Error)]
pub enum AccessError {
    /// A file of certificates.
    #[error("{option} '{path}' cannot be read: {source}", path = path.display())]
    Read {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file that has to be its owner's only.
    #[error("{option} {source}")]
    Secret {
        /// The option.
        option: &'static str,
        /// Why.
        #[source]
        source: SecretError,
    },
    /// It does not hold what it should.
    #[error("{option} '{path}' {why}", path = path.display())]
    Content {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The arbiter is none that could use it.
    #[error("{option} is for an arbiter 'etcd:...', and --arbiter names a directory")]
    NotForDirectories {
        /// The option.
        option: &'static str,
    },
}

/// A user of an etcd.
pub(super) struct User {
    name: String,
    password: String,
}

impl User {
    /// What etcd wants to hear from it first.
    pub(super) fn to_json(&self) -> Value {
        json!({ "name": self.name, "password": self.password })
    }
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The files that tell how an etcd is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EtcdFiles {
    /// `--etcd-ca`: the certificates that vouch for it.
    pub ca: Option<PathBuf>,
    /// `--etcd-cert`: the certificate that this host shows.
    pub cert: Option<PathBuf>,
    /// `--etcd-cert-key`: the private key of that.
    pub cert_key: Option<PathBuf>,
    /// `--etcd-user`: the line NAME:PASSWORD of a user.
    pub user: Option<PathBuf>,
}

/// How an etcd is asked.
#[derive(Debug, Default)]
pub struct Access {
    control_options: Vec<String>,
    pub(super) tls: Option<TlsConfig>,
    pub(super) user: Option<User>,
}

impl Access {
    /// What to do when it is not enough.
    pub(super) fn advice(&self) -> String {
        match &self.user {
            Some(User { name, .. }) => {
                format!("correct --etcd-user, and let '{name}' read and write all keys below /vmft/")
            }
            None => "name a user of it with --etcd-user, or switch authentication off there".into(),
        }
    }

    /// The options by which etcdctl asks alike, each with a space behind it.
    pub(super) fn control_options(&self) -> String {
        self.control_options.iter().map(|option| format!("{option} ")).collect()
    }

    /// Reads what the options name.
    pub fn read(args: &EtcdFiles) -> Result<Self, AccessError> {
        let tls = args.ca.as_deref().map(|ca| tls(ca, args)).transpose()?;
        let user = args.user.as_deref().map(user).transpose()?;
        let file = |option: &str, file: &Option<PathBuf>| {
            file.as_ref().map(|file| format!("{option}={}", file.display()))
        };
        let control_options = [
            file("--cacert", &args.ca),
            file("--cert", &args.cert),
            file("--key", &args.cert_key),
            user.as_ref().map(|user: &User| format!("--user={}", user.name)),
        ];
        Ok(Self { control_options: control_options.into_iter().flatten().collect(), tls, user })
    }
}

/// Refuses options that a directory has no use for.
pub(super) fn refuse_for_directory(args: &EtcdFiles) -> Result<(), AccessError> {
    let given = [("--etcd-ca", &args.ca), ("--etcd-user", &args.user)];
    match given.into_iter().find(|(_, file)| file.is_some()) {
        Some((option, _)) => Err(AccessError::NotForDirectories { option }),
        None => Ok(()),
    }
}

fn tls(ca: &Path, args: &EtcdFiles) -> Result<TlsConfig, AccessError> {
    let roots = certificates("--etcd-ca", ca)?;
    let client = match (&args.cert, &args.cert_key) {
        (Some(certificate), Some(key)) => {
            let chain = certificates("--etcd-cert", certificate)?;
            Some(ClientCert::new_with_certs(&chain, private_key("--etcd-cert-key", key)?))
        }
        _ => None,
    };
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .client_cert(client)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build())
}

/// The certificates in a file, at least one.
fn certificates(option: &'static str, path: &Path) -> Result<Vec<Certificate<'static>>, AccessError> {
    let pem =
        std::fs::read(path).map_err(|source| AccessError::Read { option, path: path.into(), source })?;
    let mut found = Vec::new();
    for item in parse_pem(&pem) {
        match item {
            Ok(PemItem::Certificate(certificate)) => found.push(certificate),
            Ok(_) => {}
            Err(error) => return Err(content(option, path, format!("is damaged: {error}"))),
        }
    }
    if found.is_empty() {
        return Err(content(option, path, "holds no certificate in the form PEM".into()));
    }
    Ok(found)
}

fn private_key(option: &'static str, path: &Path) -> Result<PrivateKey<'static>, AccessError> {
    let pem = read_secret(path, MAX_FILE_BYTES).map_err(|source| AccessError::Secret { option, source })?;
    PrivateKey::from_pem(&pem)
        .map_err(|_| content(option, path, "holds no private key in the form PEM".into()))
}

fn user(path: &Path) -> Result<User, AccessError> {
    let option = "--etcd-user";
    let bytes = read_secret(path, MAX_FILE_BYTES).map_err(|source| AccessError::Secret { option, source })?;
    let text = String::from_utf8(bytes).ok();
    let line = text.as_deref().map(|text| text.strip_suffix('\n').unwrap_or(text));
    match line.filter(|line| !line.contains(['\n', '\r'])).and_then(|line| line.split_once(':')) {
        Some((name, password)) if !name.is_empty() && !password.is_empty() => {
            Ok(User { name: name.to_owned(), password: password.to_owned() })
        }
        _ => Err(content(option, path, "does not hold one line NAME:PASSWORD".into())),
    }
}

fn content(option: &'static str, path: &Path, why: String) -> AccessError {
    AccessError::Content { option, path: path.to_owned(), why }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::pair::claims::arbiter::ArbiterSpec;

    fn said(args: &EtcdFiles) -> String {
        Access::read(args).unwrap_err().to_string()
    }

    #[test]
    fn unusable_files_are_refused_by_option_and_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let ca = EtcdFiles { ca: Some(path.clone()), ..EtcdFiles::default() };
        let user = EtcdFiles { user: Some(path.clone()), ..EtcdFiles::default() };
        for (args, option) in [(&ca, "--etcd-ca"), (&user, "--etcd-user")] {
            let said = said(args);
            assert!(
                said.starts_with(option) && said.contains("file' cannot be read: No such file"),
                "{said}"
            );
        }
        for damaged in
            ["", "monitor:password\n", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"]
        {
            fs::write(&path, damaged).unwrap();
            let said = said(&ca);
            assert!(said.starts_with("--etcd-ca '") && said.contains("file' "), "{damaged:?}: {said}");
        }
        fs::write(&path, "monitor:password\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert!(said(&user).contains("can be used by others than its owner (mode 0640)"), "{}", said(&user));
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let access = Access::read(&user).unwrap();
        assert!(!format!("{access:?}").contains("password"), "{access:?}");
        for damaged in ["", "monitor", "monitor:", ":password", "monitor:password\r\n", "a:b\nc:d\n"] {
            fs::write(&path, damaged).unwrap();
            assert!(said(&user).contains("one line NAME:PASSWORD"), "{damaged:?}: {}", said(&user));
        }
        let refused = ArbiterSpec::Directory(directory.path().to_owned()).open(&ca).unwrap_err().to_string();
        assert!(refused.contains("--etcd-ca is for an arbiter 'etcd:...'"), "{refused}");
    }
}
