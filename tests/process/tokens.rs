//! JSON Web Tokens: which are accepted, and what an issuer can do to a replica by being away, slow or wrong.

mod claims;
mod issuers;
mod serving;
