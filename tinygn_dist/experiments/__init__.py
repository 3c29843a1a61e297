"""What has not yet earned its place? Nothing imports a module of this folder; each registers itself and says which
figure would bring it in."""
