"""Small tools for trio: nurseries in context managers, shielding, a fast lock."""
