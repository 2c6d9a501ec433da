//! The place of the admin socket, as it is typed.

use std::str::FromStr;

/// Longest name, in bytes. The system has room for 107.
const MAX_SOCKET_NAME: usize = 100;

/// The place of the admin socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AdminSocket {
    /// There is none.
    Off,
    /// Named by the ops port, so that processes on one machine differ.
    #[default]
    ByOpsPort,
    /// `@` and a name that is no file, or a path.
    Named(String),
}

impl AdminSocket {
    /// The name of the socket of a process with this ops port. `None`: it has no socket.
    pub fn name(&self, ops_port: u16) -> Option<String> {
        match self {
            Self::Off => None,
            Self::Named(name) => Some(name.clone()),
            Self::ByOpsPort if cfg!(target_os = "linux") => {
                Some(format!("@fetch-proxy-{ops_port}"))
            }
            Self::ByOpsPort => {
                let file = std::env::temp_dir().join(format!("fetch-proxy-{ops_port}.sock"));
                Some(file.to_string_lossy().into_owned())
            }
        }
    }
}

impl FromStr for AdminSocket {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        match typed {
            "off" => Ok(Self::Off),
            "" | "@" => Err("a name is missing".to_owned()),
            long if long.len() > MAX_SOCKET_NAME => {
                Err(format!("must be at most {MAX_SOCKET_NAME} bytes long"))
            }
            name if name.starts_with('@') && !cfg!(target_os = "linux") => {
                Err("only Linux has names that are no files: give a path".to_owned())
            }
            name => Ok(Self::Named(name.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_is_off_or_has_a_name() {
        for (typed, name) in
            [("off", None), ("/run/fetch-proxy/admin", Some("/run/fetch-proxy/admin"))]
        {
            assert_eq!(typed.parse::<AdminSocket>().unwrap().name(1).as_deref(), name);
        }
        let long = "x".repeat(101);
        for typed in ["", "@", &long] {
            assert!(typed.parse::<AdminSocket>().is_err(), "{typed}");
        }
        let [one, other] = [1, 2].map(|port| AdminSocket::default().name(port).unwrap());
        assert_ne!(one, other, "processes on one machine differ");
    }
}
