//! Signatures by Standard Webhooks: HMAC-SHA256 over id, time and body, and secrets that begin with `whsec_`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::TryRng as _;
use rand::rngs::{SysError, SysRng};
use sha2::Sha256;

const PREFIX: &str = "whsec_";
const SECRET_BYTES: usize = 32;

/// Makes a new secret.
///
/// # Errors
/// When the system gives no randomness.
pub fn new_secret() -> Result<String, SysError> {
    let mut secret = [0; SECRET_BYTES];
    SysRng.try_fill_bytes(&mut secret)?;
    Ok(format!("{PREFIX}{}", STANDARD.encode(secret)))
}

/// `v1,` and the signature; `None` for a secret that is none of ours.
pub fn sign(secret: &str, id: &str, unix_time: i64, body: &str) -> Option<String> {
    let secret = STANDARD.decode(secret.strip_prefix(PREFIX)?).ok()?;
    let mut mac = Hmac::<Sha256>::new_from_slice(&secret).ok()?;
    mac.update(format!("{id}.{unix_time}.{body}").as_bytes());
    let signature = STANDARD.encode(mac.finalize().into_bytes());
    Some(format!("v1,{signature}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vector_of_the_reference_implementations_holds() {
        let signature = sign(
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            "{\"test\": 2432232314}",
        );
        let expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        assert_eq!(signature.as_deref(), Some(expected));
        assert_eq!(sign("secret", "a", 0, ""), None);
        let secret = new_secret().expect("randomness");
        assert!(sign(&secret, "a", 0, "").is_some());
    }
}
