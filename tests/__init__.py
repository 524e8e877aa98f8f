"""Tests of vistok; mirrors its folders."""
