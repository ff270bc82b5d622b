//! Where messages may go: not into the network that the service stands in (server-side request forgery).
//!
//! Addresses are judged where a connection takes them from, so that a name cannot mean one address when it is checked
//! and another when it is used.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use ureq::Error;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// Finds addresses, and keeps those that may be called.
#[derive(Debug, Default)]
pub struct GuardedResolver {
    inner: DefaultResolver,
    allowed: Vec<IpNet>,
}

impl GuardedResolver {
    /// `allowed` are networks that may be called besides public ones, and without TLS.
    pub fn new(allowed: Vec<IpNet>) -> Self {
        Self {
            inner: DefaultResolver::default(),
            allowed,
        }
    }
}

impl Resolver for GuardedResolver {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let found = self.inner.resolve(uri, config, timeout)?;
        let encrypted = uri.scheme_str() == Some("https");
        let mut kept = self.empty();
        for address in &found {
            if may_call(address.ip(), encrypted, &self.allowed) {
                kept.push(*address);
            }
        }
        if kept.is_empty() {
            let message = "the address is not public; `webhook_allowed_networks` can allow it";
            return Err(Error::Other(message.into()));
        }
        Ok(kept)
    }
}

/// Whether messages may go to an address.
pub fn may_call(address: IpAddr, encrypted: bool, allowed: &[IpNet]) -> bool {
    let address = address.to_canonical();
    (encrypted && is_public(address)) || allowed.iter().any(|network| network.contains(&address))
}

/// By the registries of special-purpose addresses (RFC 6890 and its successors).
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !matches!(
        (a, b, c),
        (0 | 10 | 127 | 224.., ..)
            | (100, 64..=127, _)
            | (169, 254, _)
            | (172, 16..=31, _)
            | (192, 0, 0 | 2)
            | (192, 88, 99)
            | (192, 168, _)
            | (198, 18 | 19, _)
            | (198, 51, 100)
            | (203, 0, 113)
    )
}

/// Only what is given out as global unicast, and of that nothing that leads to IPv4 by another way.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, ..] = address.segments();
    let global = a & 0xe000 == 0x2000;
    let special = (a == 0x2001 && (b < 0x0200 || b == 0x0db8)) // Teredo and other protocols; documentation
        || a == 0x2002 // 6to4
        || (a == 0x3fff && b < 0x1000);
    global && !special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_may_be_called() {
        let may = |address: &str| may_call(address.parse().expect("an address"), true, &[]);
        for public in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111"] {
            assert!(may(public), "{public}");
        }
        for other in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "2001::1",
            "2001:db8::1",
            "2002:a00:1::",
            "fc00::1",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!may(other), "{other}");
        }
    }

    #[test]
    fn networks_can_be_allowed() {
        let allowed = ["10.0.0.0/8".parse().expect("a network")];
        let may = |address: &str, encrypted| {
            may_call(address.parse().expect("an address"), encrypted, &allowed)
        };
        assert!(may("10.1.2.3", false) && may("::ffff:10.1.2.3", true));
        assert!(!may("192.168.1.1", true));
        assert!(!may("1.1.1.1", false), "a public address needs TLS");
    }
}
