"""Second floor: which heads are named, in which role, and how sure are we?"""
