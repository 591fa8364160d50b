//! Certificates for an etcd of a test: of a CA, of the servers, and of who asks them.
//!
//! Owns: what is in them, and the names of their files. The monitor's own tests include this file.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, IsCa, Issuer, KeyPair};

/// The CA's certificate.
pub const CA: &str = "etcd-ca";
/// Certificate and private key of servers.
pub const SERVER: [&str; 2] = ["etcd-server", "etcd-server-key"];
/// Certificate and private key of who asks.
pub const CLIENT: [&str; 2] = ["etcd-client", "etcd-client-key"];

/// Writes all of them into `directory`, for servers at `address`.
pub fn make(directory: &Path, address: &str) -> io::Result<()> {
    let write = |name: &str, text: &str| write_secret(&directory.join(name), text);
    let mut ca = CertificateParams::new([]).map_err(io::Error::other)?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().map_err(io::Error::other)?;
    write(CA, &ca.self_signed(&key).map_err(io::Error::other)?.pem())?;
    let issuer = Issuer::new(ca, key);
    for [certificate_name, key_name] in [SERVER, CLIENT] {
        let mut params = CertificateParams::new([address.to_owned()]).map_err(io::Error::other)?;
        // With users, etcd's gateway refuses certificates that name one.
        params.distinguished_name = DistinguishedName::new();
        let key = KeyPair::generate().map_err(io::Error::other)?;
        write(certificate_name, &params.signed_by(&key, &issuer).map_err(io::Error::other)?.pem())?;
        write(key_name, &key.serialize_pem())?;
    }
    Ok(())
}

/// Writes a file that only its owner may read.
pub fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}
