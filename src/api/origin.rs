//! Which pages may call a service that asks for no keys.
//!
//! A web page anywhere can send requests to a service on the reader's own machine. Two things tell it from a client
//! that means to: the name it calls us by, when its own name was made to point here (DNS rebinding), and its origin.

use std::net::IpAddr;

use actix_web::http::Uri;
use actix_web::http::header::{self, HeaderMap};

use super::codes::Code;
use super::problem::Problem;

/// The names and origins that are let in.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    /// Besides `localhost` and loopback addresses.
    pub hosts: Vec<String>,
    /// Origins of web pages, such as `https://studio.example`.
    pub pages: Vec<String>,
}

impl Origins {
    /// # Errors
    /// 403 when the request was not meant for this service, or comes from a page that nobody has allowed.
    pub fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
        let host = headers.get(header::HOST).map(|value| value.to_str());
        // HTTP/2 and proxies' absolute form have the name in the address.
        let host = match host {
            Some(Ok(host)) => host,
            Some(Err(_)) => return Err(refused_host("")),
            None => match uri.authority() {
                Some(authority) => authority.as_str(),
                None => return Err(refused_host("")),
            },
        };
        if !self.names_us(name_of(host)) {
            return Err(refused_host(host));
        }
        let Some(origin) = headers.get(header::ORIGIN) else {
            return Ok(());
        };
        let origin = origin.to_str().unwrap_or_default();
        let own = origin
            .split_once("://")
            .is_some_and(|(_, authority)| authority.eq_ignore_ascii_case(host));
        if own || self.pages.iter().any(|page| page == "*" || page == origin) {
            return Ok(());
        }
        let detail = format!(
            "the page `{origin}` may not call this service; name it in `cors_origins`, or make a key with `lorasmith keys`"
        );
        Err(Problem::new(Code::OriginRefused, detail))
    }

    fn names_us(&self, name: &str) -> bool {
        let address: Option<IpAddr> = name.parse().ok();
        name.eq_ignore_ascii_case("localhost")
            || address.is_some_and(|address| address.is_loopback())
            || self
                .hosts
                .iter()
                .any(|host| host.eq_ignore_ascii_case(name))
    }
}

/// Without port and brackets.
fn name_of(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    host.split(':').next().unwrap_or_default()
}

fn refused_host(host: &str) -> Problem {
    let detail = format!(
        "found the host `{host}`, expected `localhost` or a loopback address; name others in `allowed_hosts`"
    );
    Problem::new(Code::HostRefused, detail)
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::{HeaderName, HeaderValue};

    use super::*;

    fn check(host: &str, origin: Option<&str>) -> Result<(), Code> {
        let origins = Origins {
            hosts: vec!["trainer.lan".to_owned()],
            pages: vec!["https://studio.example".to_owned()],
        };
        let mut headers = HeaderMap::new();
        let mut insert = |name: HeaderName, value: &str| {
            headers.insert(name, HeaderValue::from_str(value).expect("a value"));
        };
        insert(header::HOST, host);
        if let Some(origin) = origin {
            insert(header::ORIGIN, origin);
        }
        let checked = origins.check(&Uri::from_static("/v1/runs"), &headers);
        checked.map_err(|problem| problem.code())
    }

    #[test]
    fn a_name_that_was_made_to_point_here_is_refused() {
        for host in [
            "localhost:7870",
            "LocalHost",
            "127.0.0.1:7870",
            "127.9.9.9",
            "[::1]:7870",
            "trainer.lan:80",
        ] {
            assert_eq!(check(host, None), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "192.168.1.2",
            "",
        ] {
            assert_eq!(check(host, None), Err(Code::HostRefused), "{host}");
        }
    }

    #[test]
    fn other_pages_are_refused() {
        let from = |origin| check("localhost:7870", Some(origin));
        assert_eq!(from("http://localhost:7870"), Ok(()));
        assert_eq!(from("https://studio.example"), Ok(()));
        for origin in ["http://localhost:3000", "https://evil.example", "null"] {
            assert_eq!(from(origin), Err(Code::OriginRefused), "{origin}");
        }
    }
}
